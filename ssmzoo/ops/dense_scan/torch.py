"""The dense scan in PyTorch: slices of time, sequential or parallel, with the backward pass written out.

Two recurrences share the loop h_t = T_t h_{t-1} + x_t: one takes the distinct transitions of symbols (s n n), the other
mixes T_t from a dictionary, slice by slice, and mixes again in the backward pass, so that (b l n n) never exists.
A masked step is T = 1, x = 0 and a reset is T = 0; both come encoded with the symbol in one integer per step.

The gradients, for loss gradients d: g_t = dh_t + T_{t+1}' g_{t+1} (the same recurrence backwards in time), dx_t = g_t,
dT_t = g_t h_{t-1}', and through the column norm v of M = T v:  dM = (dT - sign(T) |T|^(p-1) sum_i(dT T)) / v.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ssmzoo.ops.dense_scan import MIXTURES, RESET, SKIP, SYMBOLS, Mixtures, Symbols, check_codes, dense_scan, scan
from ssmzoo.ops.library import Kernel

# Products of transitions pay in PyTorch for long sequences of few, small states: n^3 work against the cost of a step.
PARALLEL_FROM, PARALLEL_WIDTH = 256, 128  # steps, from; batch times n, up to (measured on a CPU)
SLICE_ELEMENTS = 1 << 22  # elements of the transitions that exist at one time


# ---------------------------------------------------------------- transitions that depend on symbols


def symbols_forward(a: Symbols, save: bool):
    s = a.T.shape[0]
    if a.codes.is_cpu:
        check_codes(a.codes, s)
    else:  # without waiting for the device: NaN where the reference raises
        known = (a.codes >= 0) & (a.codes & (SKIP - 1) < s)
        a = a._replace(x=a.x.masked_fill(~known[..., None], math.nan), codes=a.codes.masked_fill(~known, 0))
    return _forward(lambda now: _pick(a.T, a.codes[:, now]), a), None


def symbols_backward(a: Symbols, states: Tensor, d_last: Tensor, d_states: Tensor | None) -> dict[str, Tensor]:
    g, d_h0 = _backward(lambda now: _pick(a.T, a.codes[:, now]), a, d_states, d_last)
    before = _before(states, a.h0).flatten(0, 1)  # (b l n)
    flat, dT = a.codes.flatten(), torch.zeros_like(a.T)
    for s in range(a.T.shape[0]):
        if flat.is_cpu:
            at = (flat == s).nonzero().squeeze(1)
            dT[s] = g.flatten(0, 1)[at].mT @ before[at]
        else:  # without waiting for the device
            dT[s] = g.flatten(0, 1).masked_fill((flat != s)[:, None], 0).mT @ before
    return {"T": dT, "x": _unless_skipped(g, a.codes), "h0": d_h0}


# ---------------------------------------------------------------- transitions mixed from a dictionary


def mixture_forward(a: Mixtures, save: bool):
    return _forward(lambda now: _mix(a.A_dict, a.weights[:, now], a.p_norm)[0], a), None


def mixture_backward(a: Mixtures, states: Tensor, d_last: Tensor, d_states: Tensor | None) -> dict[str, Tensor]:
    n, k = a.A_dict.shape[1:]
    g, d_h0 = _backward(lambda now: _mix(a.A_dict, a.weights[:, now], a.p_norm)[0], a, d_states, d_last)
    before = _before(states, a.h0)
    used = a.codes < SKIP
    dA, dw = torch.zeros_like(a.A_dict).view(n * n, k), torch.empty_like(a.weights)
    for now in _slices(*a.codes.shape, n):
        T, v = _mix(a.A_dict, a.weights[:, now], a.p_norm)  # (c b n n), (c b 1 n)
        g_now, before_now = g[:, now].transpose(0, 1), before[:, now].transpose(0, 1)
        dT = g_now.unsqueeze(-1) * before_now.unsqueeze(-2)
        shape = T.sign() * T.abs().pow(a.p_norm - 1) if a.p_norm != 1 else T.sign()
        dM = (dT - shape * (dT * T).sum(-2, keepdim=True)) / v
        dM = torch.where(used[:, now].mT[..., None, None], dM, 0.0).flatten(0, 1).flatten(1)  # (c b, n n)
        dA += dM.mT @ a.weights[:, now].transpose(0, 1).flatten(0, 1)
        dw[:, now] = (dM @ a.A_dict.view(n * n, k)).view(*g_now.shape[:2], k).transpose(0, 1)
    return {"A_dict": dA.view_as(a.A_dict), "weights": dw, "x": _unless_skipped(g, a.codes), "h0": d_h0}


def _mix(A_dict: Tensor, weights: Tensor, p_norm: float) -> tuple[Tensor, Tensor]:
    """T (c b n n) and the column norms (c b 1 n), for weights (b c k)."""
    M = torch.einsum("ijk,bck->cbij", A_dict, weights)
    v = torch.linalg.vector_norm(M, p_norm, dim=-2, keepdim=True)
    return M / v, v


# ---------------------------------------------------------------- the recurrence


def _forward(transitions: Callable[[slice], Tensor], a) -> tuple[Tensor, Tensor]:
    """The last state (b n) and the states (b l n), or (b 0 n) unless a.keep."""
    b, l, n = a.x.shape
    states, h = a.x.new_empty(b, l if a.keep else 0, n), a.h0
    x = _unless_skipped(a.x, a.codes)
    for now in _slices(b, l, n):
        steps = _recur(_flagged(transitions(now), a.codes[:, now]), x[:, now].transpose(0, 1), h, a.parallel)
        h = steps[-1]
        if a.keep:
            states[:, now] = steps.transpose(0, 1)
    return h.clone(), states


def _backward(transitions: Callable[[slice], Tensor], a, d_states: Tensor | None, d_last: Tensor):
    """g (b l n), the gradient of every state including what comes through later ones, and that of h0."""
    (b, l), n = a.codes.shape, d_last.shape[-1]
    g, carry = d_last.new_empty(b, l, n), d_last
    for now in reversed(list(_slices(b, l, n))):
        T = _flagged(transitions(now), a.codes[:, now]).mT
        backwards = torch.cat([torch.eye(n, dtype=T.dtype, device=T.device).expand(1, b, n, n), T[1:].flip(0)])
        d_now = T.new_zeros(1, 1, n).expand(len(T), b, n) if d_states is None else d_states[:, now].transpose(0, 1)
        steps = _recur(backwards, d_now.flip(0), carry, a.parallel)
        g[:, now] = steps.flip(0).transpose(0, 1)
        carry = (T[0] @ steps[-1].unsqueeze(-1)).squeeze(-1)
    return g, carry.clone()


def _recur(T: Tensor, x: Tensor, h: Tensor, parallel: bool) -> Tensor:
    """h_t = T_t h_{t-1} + x_t over the first axis: T (c b n n), x (c b n), h (b n) -> (c b n)."""
    c = T.shape[0]
    if not parallel or c < 8:
        steps = torch.empty_like(x)
        for t in range(c):
            h = torch.baddbmm(x[t].unsqueeze(-1), T[t], h.unsqueeze(-1)).squeeze(-1)
            steps[t] = h
        return steps
    # m blocks of q steps: products and responses inside all blocks at once, then from block to block
    q = max(2, int(c**0.5))
    m = c // q
    blocks, inputs = T[: m * q].unflatten(0, (m, q)), x[: m * q].unflatten(0, (m, q)).unsqueeze(-1)
    P, v = [blocks[:, 0]], [inputs[:, 0]]
    for j in range(1, q):
        P.append(blocks[:, j] @ P[-1])
        v.append(blocks[:, j] @ v[-1] + inputs[:, j])
    h, starts = h.unsqueeze(-1), []
    for i in range(m):
        starts.append(h)
        h = P[-1][i] @ h + v[-1][i]
    starts = torch.stack(starts)  # (m b n 1)
    steps = torch.stack([p @ starts + w for p, w in zip(P, v)], dim=1).flatten(0, 1).squeeze(-1)
    rest = _recur(T[m * q :], x[m * q :], h.squeeze(-1), False)
    return torch.cat([steps, rest])


def _slices(b: int, l: int, n: int) -> Iterator[slice]:
    c = max(1, SLICE_ELEMENTS // max(1, b * n * n))
    return (slice(t, min(t + c, l)) for t in range(0, l, c))


def _pick(T: Tensor, codes: Tensor) -> Tensor:
    """(c b n n) transitions of the codes (b c); flagged steps are replaced afterwards."""
    return T[torch.where(codes < SKIP, codes, 0).mT.long()]


def _flagged(T: Tensor, codes: Tensor) -> Tensor:
    """T (c b n n) with 1 at masked steps and 0 at resets."""
    codes = codes.mT
    if codes.numel() == 0 or codes.is_cpu and int(codes.max()) < SKIP:
        return T
    skipped = (codes & SKIP).bool()[..., None, None]
    T = torch.where(skipped, torch.eye(T.shape[-1], dtype=T.dtype, device=T.device), T)
    return torch.where((codes >= RESET)[..., None, None], 0.0, T)


def _unless_skipped(x: Tensor, codes: Tensor) -> Tensor:
    return torch.where((codes & SKIP).bool().unsqueeze(-1), 0.0, x)


def _before(states: Tensor, h0: Tensor) -> Tensor:
    return torch.cat([h0.unsqueeze(1), states[:, :-1]], dim=1)[:, : states.shape[1]]


def _without_autocast(function: Callable) -> Callable:
    def run(a, *rest):
        with torch.autocast(a.x.device.type, enabled=False):
            return function(a, *rest)

    return run


SYMBOLS_KERNEL = Kernel(*map(_without_autocast, (symbols_forward, symbols_backward)))
MIXTURES_KERNEL = Kernel(*map(_without_autocast, (mixture_forward, mixture_backward)))
SYMBOLS.kernels["torch"], MIXTURES.kernels["torch"] = SYMBOLS_KERNEL, MIXTURES_KERNEL


@dense_scan.register("torch", composite=dense_scan.backends["reference"].function)
def dense_scan_torch(a):
    b, l = a.weights.shape[:2] if a.symbols is None else a.symbols.shape
    n = a.A_dict.shape[0]
    pays = l >= PARALLEL_FROM and b * n <= PARALLEL_WIDTH and n <= 32
    return scan(a, "torch", pays if a.parallel is None else a.parallel)
