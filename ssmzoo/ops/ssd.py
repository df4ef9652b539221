"""State-space duality: the scan of Mamba-2, whose decay is one scalar per head, as masked matrix products over chunks.

    S_t = exp(a_t) S_{t-1} + X_t (outer) B_t          y_t = S_t C_t

Inside a chunk of q positions the same numbers are a masked attention, Y = (L o C B^T) X with
L_ts = exp(a_{s+1} + ... + a_t) for s <= t, so that nearly all the work is matrix products; only one state per chunk is
carried on. `ssd_scan` is this recurrence; `mamba_chunk_scan_combined` puts the time step, skip and gate around it.

Letters: b batch, l length, h heads, p width of a head, g groups sharing B and C, n state size, c chunks of q.
Source: Dao & Gu 2024 (arXiv 2405.21060), sections 3 and 6; state-spaces/mamba ops/triton/ssd_combined.py for the
signature, modules/ssd_minimal.py for the minimal form.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmzoo.ops.checks import compute_dtype, expect, expect_floats, expect_seq_idx, resets
from ssmzoo.ops.dispatch import op
from ssmzoo.ops.selective_scan import selective_state_update

TORCH_CHUNK = 64  # longer chunks cost more than they save once q exceeds the width of a head


def check_ssd_scan(X, a, B, C, initial_states=None, seq_idx=None, chunk_size=TORCH_CHUNK) -> None:
    _check_heads("X", X, "a", a, B, C, initial_states, seq_idx, chunk_size)


def check_combined(
    x,
    dt,
    A,
    B,
    C,
    chunk_size=256,
    D=None,
    z=None,
    dt_bias=None,
    initial_states=None,
    seq_idx=None,
    dt_softplus=False,
    dt_limit=(0.0, math.inf),
    return_final_states=False,
) -> None:
    sizes = _check_heads("x", x, "dt", dt, B, C, initial_states, seq_idx, chunk_size)
    expect("A", A, ("h",), sizes)
    if D is not None:
        expect("D", D, ("h", "p") if D.ndim == 2 else ("h",), sizes)
    if z is not None:
        expect("z", z, ("b", "l", "h", "p"), sizes)
    if dt_bias is not None:
        expect("dt_bias", dt_bias, ("h",), sizes)
    expect_floats(x.device, x=x, A=A, D=D, z=z, dt_bias=dt_bias)
    if len(dt_limit) != 2 or not dt_limit[0] <= dt_limit[1]:
        raise ValueError(f"dt_limit = {tuple(dt_limit)}, expected (lowest, highest) in tokens")


def _check_heads(x_name, x, a_name, a, B, C, initial_states, seq_idx, chunk_size) -> dict[str, int]:
    sizes: dict[str, int] = {}
    expect(x_name, x, ("b", "l", "h", "p"), sizes)
    expect(a_name, a, ("b", "l", "h"), sizes)
    expect("B", B, ("b", "l", "g", "n"), sizes)
    expect("C", C, ("b", "l", "g", "n"), sizes)
    if sizes["g"] == 0 or sizes["h"] % sizes["g"]:
        raise ValueError(f"B has {sizes['g']} groups, which do not divide the {sizes['h']} heads of {x_name}")
    if initial_states is not None:
        expect("initial_states", initial_states, ("b", "h", "p", "n"), sizes)
    if chunk_size < 1:
        raise ValueError(f"chunk_size = {chunk_size}, expected at least 1")
    expect_floats(x.device, **{x_name: x, a_name: a, "B": B, "C": C, "initial_states": initial_states})
    expect_seq_idx(seq_idx, x.device, sizes)
    return sizes


@op(check=check_ssd_scan)
def ssd_scan(
    X: Tensor,
    a: Tensor,
    B: Tensor,
    C: Tensor,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    chunk_size: int = TORCH_CHUNK,
) -> tuple[Tensor, Tensor]:
    """The bare recurrence S_t = exp(a_t) S_{t-1} + X_t (outer) B_t, y_t = S_t C_t.

    X          (b l h p)  input, already multiplied by the time step
    a          (b l h)    logarithm of the decay, dt * A, at most 0 for a stable scan
    B, C       (b l g n)  head i uses group i // (h/g)
    initial_states (b h p n), seq_idx (b l): as in `mamba_chunk_scan_combined`
    returns    (b l h p) in X's dtype and the last state (b h p n), fp32 (float64 for float64 input)
    """
    b, l, h, p = X.shape
    g, n = B.shape[2:]
    dtype = compute_dtype(X, a, B, C)
    B, C = (v.to(dtype).repeat_interleave(h // g, dim=2) for v in (B, C))
    state = X.new_zeros(b, h, p, n, dtype=dtype) if initial_states is None else initial_states.to(dtype)
    reset = None if seq_idx is None else resets(seq_idx)
    ys = []
    for t in range(l):
        if reset is not None:
            state = torch.where(reset[:, t].view(b, 1, 1, 1), 0.0, state)
        decay = a[:, t].to(dtype).exp().view(b, h, 1, 1)
        state = decay * state + X[:, t].to(dtype).unsqueeze(-1) * B[:, t].unsqueeze(-2)
        ys.append((state * C[:, t].unsqueeze(-2)).sum(-1))
    y = torch.stack(ys, dim=1) if ys else X.new_zeros(b, 0, h, p, dtype=dtype)
    return y.to(X.dtype), state


@op(check=check_combined)
def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int = 256,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run Mamba-2's recurrence with time step, skip and gate; drop-in for mamba-ssm's function of this name.

        dt = clamp(softplus(dt + dt_bias), dt_limit)
        S_t = exp(dt_t A) S_{t-1} + dt_t x_t (outer) B_t      y_t = (S_t C_t + D x_t) * SiLU(z_t)

    x, z       (b l h p)  input and optional gate
    dt         (b l h)    time step; positive (in tokens) after dt_softplus and dt_limit, clamped in this order
    A          (h)        real and negative, fp32; decay per unit of time
    B, C       (b l g n)  head i uses group i // (h/g)
    chunk_size            kept for compatibility: an upper bound that backends may go below; any l is accepted
    D, dt_bias            (h) or (h p) skip weight; (h) bias added before the softplus
    initial_states        (b h p n) fp32 state before the first position, zero when missing
    seq_idx    (b l) int  where it changes from t-1 to t, the state is set to 0 before t
    returns    (b l h p)  in x's dtype; with return_final_states also the last state (b h p n) in fp32

    Raises ValueError naming the argument, its shape and the one expected.
    """
    scan = functools.partial(_with_skip, ssd_scan.reference)
    return around_scan(
        scan,
        x,
        dt,
        A,
        B,
        C,
        chunk_size,
        D,
        z,
        dt_bias,
        initial_states,
        seq_idx,
        dt_softplus,
        dt_limit,
        return_final_states,
    )


def around_scan(
    scan,
    x,
    dt,
    A,
    B,
    C,
    chunk_size=256,
    D=None,
    z=None,
    dt_bias=None,
    initial_states=None,
    seq_idx=None,
    dt_softplus=False,
    dt_limit=(0.0, math.inf),
    return_final_states=False,
):
    """Time steps before and gate after scan(x, dt, a = dt A, B, C, D (h p), initial_states, seq_idx, chunk_size)."""
    dtype = compute_dtype(x, dt, A, B, C)
    dt = dt.to(dtype)
    if dt_bias is not None:
        dt = dt + dt_bias.to(dtype)
    if dt_softplus:
        dt = F.softplus(dt)
    if dt_limit[0] > 0 or dt_limit[1] < math.inf:
        dt = dt.clamp(dt_limit[0], dt_limit[1])
    if D is not None and D.ndim == 1:
        D = D.unsqueeze(-1).expand(x.shape[2:])
    out_dtype = x.dtype
    x = x if z is None else x.to(dtype)  # rounds once, after the gate
    y, state = scan(x, dt, dt * A.to(dtype), B, C, D, initial_states, seq_idx, chunk_size)
    if z is not None:
        y = (y * F.silu(z.to(dtype))).to(out_dtype)
    return (y, state) if return_final_states else y


def _with_skip(scan, x, dt, a, B, C, D, initial_states, seq_idx, chunk_size):
    """A bare scan of dt x, plus D x."""
    dtype = compute_dtype(x, a, B, C)
    y, state = scan(x.to(dtype) * dt.unsqueeze(-1), a, B, C, initial_states, seq_idx, chunk_size)
    return (y if D is None else y + x.to(dtype) * D.to(dtype)).to(x.dtype), state


def ssd_minimal_discrete(
    X: Tensor, A: Tensor, B: Tensor, C: Tensor, block_len: int, initial_states: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The one-page form of the paper (listing 1): X (b l h p) already multiplied by dt, A (b l h) the log decay,
    B, C (b l h n), initial_states (b 1 h p n); returns Y (b l h p) and the last state (b h p n)."""
    if initial_states is not None:
        if initial_states.ndim != 5 or initial_states.shape[1] != 1:
            raise ValueError(f"initial_states has shape {tuple(initial_states.shape)}, expected (b, 1, h, p, n)")
        initial_states = initial_states[:, 0]
    return ssd_scan(X, A, B, C, initial_states, chunk_size=block_len)


def ssd_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> Tensor:
    """One decoding step of `mamba_chunk_scan_combined`, in place on `state` (b h p n).

    x, z       (b h p)
    dt         (b h)    clamp it beforehand where the model has a dt_limit (then without dt_softplus)
    A, dt_bias (h)
    B, C       (b g n)
    D          (h) or (h p)
    returns    (b h p) in x's dtype

    The same step as `selective_state_update`, which takes everything per channel, with one value per head.
    """
    sizes: dict[str, int] = {}
    expect("state", state, ("b", "h", "p", "n"), sizes)
    expect("dt", dt, ("b", "h"), sizes)
    expect("A", A, ("h",), sizes)
    if dt_bias is not None:
        expect("dt_bias", dt_bias, ("h",), sizes)
    if D is not None:
        expect("D", D, ("h", "p") if D.ndim == 2 else ("h",), sizes)
    _, h, p, n = state.shape
    D, dt_bias = (v if v is None or v.ndim == 2 else v[:, None].expand(h, p) for v in (D, dt_bias))
    dt, A = dt[..., None].expand(*dt.shape, p), A[:, None, None].expand(h, p, n)
    return selective_state_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)


@ssd_scan.register("torch")
def ssd_scan_torch(X, a, B, C, initial_states=None, seq_idx=None, chunk_size=TORCH_CHUNK):
    """Chunks of q positions as matrix products; extra memory O(b l h (q + p)), states only at chunk boundaries."""
    b, l, h, p = X.shape
    g, n = B.shape[2:]
    q = max(1, min(chunk_size, TORCH_CHUNK, l))
    dtype = compute_dtype(X, a, B, C)
    state = X.new_zeros(b, h, p, n, dtype=dtype) if initial_states is None else initial_states.to(dtype)
    if l == 0 or b == 0:
        return X * 0, state
    pad, c, out_dtype = -l % q, -(-l // q), X.dtype

    def chunks(v, heads):  # (b l ... ) -> (b c g r q ...)
        v = F.pad(v.to(dtype), (0, 0) * (v.ndim - 2) + (0, pad))
        v = v.unflatten(1, (c, q)).unflatten(3, (g, heads))
        return v.movedim(2, 4)

    X, a = chunks(X, h // g), chunks(a, h // g)  # (b c g r q p), (b c g r q)
    B, C = chunks(B, 1), chunks(C, 1)  # (b c g 1 q n)
    with torch.autocast(X.device.type, enabled=False):
        inside, from_start, to_end, whole = _decays(a, _documents(seq_idx, pad, c, q))
        Y = (inside * (C @ B.mT)) @ X  # (b c g r q p)
        update = (X * to_end.unsqueeze(-1)).mT @ B  # (b c g r p n)
        state, before = state.unflatten(1, (g, h // g)), []
        for i in range(c):
            before.append(state)
            state = whole[:, i, ..., None, None] * state + update[:, i]
        Y = Y + from_start.unsqueeze(-1) * (C @ torch.stack(before, dim=1).mT)
    Y = Y.movedim(4, 2).reshape(b, c * q, h, p)[:, :l]
    return Y.to(out_dtype), state.flatten(1, 2)


def _documents(seq_idx, pad, c, q):
    """Number of resets up to each position, (b c 1 1 q), and at the last position before each chunk, (b c 1 1)."""
    if seq_idx is None:
        return None
    count = resets(seq_idx).long().cumsum(1)
    count = torch.cat([count, count[:, -1:].expand(-1, pad)], dim=1).unflatten(1, (c, q))
    previous = F.pad(count[:, :-1, -1], (1, 0))
    return count[:, :, None, None], previous[:, :, None, None]


def _decays(a, documents):
    """exp of sums of a (... q) inside a chunk: between two positions (... q q), from the start up to and including each
    position, from after each position to the end, and over the whole chunk. Sums are accumulated for each pair, so
    that no large sums are subtracted; what crosses a document boundary is exactly 0, with gradient 0."""
    q = a.shape[-1]
    lower = torch.ones(q, q, dtype=torch.bool, device=a.device).tril()
    pairs = a.unsqueeze(-1).expand(*a.shape, q).masked_fill(~lower.tril(-1), 0).cumsum(-2)
    start = a.cumsum(-1)
    end = pairs[..., -1, :]
    whole = start[..., -1]
    keep = lower
    if documents is not None:
        here, previous = documents
        keep = lower & (here.unsqueeze(-1) == here.unsqueeze(-2))
        start = start.masked_fill(here != previous.unsqueeze(-1), -math.inf)
        end = end.masked_fill(here != here[..., -1:], -math.inf)
        whole = whole.masked_fill(here[..., -1] != previous, -math.inf)
    return pairs.masked_fill(~keep, -math.inf).exp(), start.exp(), end.exp(), whole.exp()


mamba_chunk_scan_combined.register("torch")(
    functools.partial(around_scan, functools.partial(_with_skip, ssd_scan_torch))
)
