"""The selective scan in plain PyTorch, any device: chunks of time, states recomputed in the backward.

Tensors of one chunk are laid out (t b g r n): time first, so that a step reads and writes contiguous slices; e = g r.
Only the states at chunk starts are kept for the backward. Nothing is divided by cumulative products of decays, so that
strongly negative A is exact.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmzoo.ops.checks import compute_dtype, resets
from ssmzoo.ops.library import Kernel
from ssmzoo.ops.selective_scan import empty_gradients, groups_of, register, selective_scan_fn, why_not_complex


def chunk_length(length: int, n: int) -> int:
    """Steps per chunk: at least n where that is affordable, so that saved states take no more memory than u."""
    return max(16, min(n, math.isqrt(length)))


def saved(a) -> Tensor:
    (b, e, l), n = a.u.shape, a.A.shape[1]
    t = chunk_length(l, n)
    return a.u.new_empty((l + t - 1) // t, b, e, n, dtype=compute_dtype(a.u, a.delta, a.A, a.B, a.C))


class _Chunk(NamedTuple):
    """What one chunk of time needs, in compute precision."""

    u: Tensor  # t b g r
    raw: Tensor  # t b g r; delta + bias, before the softplus
    dt: Tensor  # t b g r
    decay: Tensor  # t b g r n; exp(dt A)
    B: Tensor  # t b g 1 n, or g r n when constant
    C: Tensor
    reset: Tensor | None  # t b 1 1 1 bool


class _Scan:
    """The arguments of one call, cut into chunks on demand."""

    def __init__(self, a):
        self.dtype = compute_dtype(a.u, a.delta, a.A, a.B, a.C)
        self.b, self.e, self.l = a.u.shape
        self.n, self.g = a.A.shape[1], groups_of(a)
        self.r = self.e // self.g
        self.u, self.delta, self.z = (None if t is None else t.permute(2, 0, 1) for t in (a.u, a.delta, a.z))  # l b e
        self.A = self.channels(a.A)
        self.B, self.C = (self.channels(M) if M.ndim == 2 else M.permute(3, 0, 1, 2)[..., None, :] for M in (a.B, a.C))
        self.D = None if a.D is None else self.channels(a.D)
        self.bias = None if a.delta_bias is None else self.channels(a.delta_bias)
        self.reset = None if a.seq_idx is None else resets(a.seq_idx).t()[..., None, None, None]
        self.softplus = a.delta_softplus
        self.steps = chunk_length(self.l, self.n)

    def channels(self, t: Tensor) -> Tensor:
        """(e ...) -> (g r ...)"""
        return t.to(self.dtype).reshape(self.g, self.r, *t.shape[1:])

    def sequence(self, t: Tensor, span: slice) -> Tensor:
        """(l b e) -> (t b g r) of one chunk."""
        return t[span].to(self.dtype).unflatten(2, (self.g, self.r))

    def state(self, t: Tensor | None) -> Tensor:
        shape = self.b, self.g, self.r, self.n
        return self.A.new_zeros(shape) if t is None else t.to(self.dtype).reshape(shape)

    def spans(self) -> list[slice]:
        return [slice(s, min(s + self.steps, self.l)) for s in range(0, self.l, self.steps)]

    def chunk(self, span: slice) -> _Chunk:
        raw = self.sequence(self.delta, span)
        raw = raw if self.bias is None else raw + self.bias
        dt = F.softplus(raw) if self.softplus else raw
        B, C = (M if M.ndim == 3 else M[span].to(self.dtype) for M in (self.B, self.C))
        reset = None if self.reset is None else self.reset[span]
        return _Chunk(self.sequence(self.u, span), raw, dt, (dt[..., None] * self.A).exp_(), B, C, reset)

    def states(self, c: _Chunk, start: Tensor) -> Tensor:
        """(t+1 b g r n): the state before the chunk's first step, then after each of its steps."""
        steps = c.dt.shape[0]
        h = torch.empty(steps + 1, *start.shape, dtype=self.dtype, device=start.device)
        h[0] = start
        torch.mul((c.dt * c.u)[..., None], c.B, out=h[1:])
        h_at, decay_at = h.unbind(), c.decay.unbind()
        for t in range(steps):
            previous = h_at[t] if c.reset is None else h_at[t].masked_fill(c.reset[t], 0)
            h_at[t + 1].addcmul_(decay_at[t], previous)
        return h


def _contract(h: Tensor, M: Tensor) -> Tensor:
    """sum over n of h (t b g r n) with M (t b g 1 n) or (g r n)."""
    return (h * M).sum(-1) if M.ndim == 3 else torch.matmul(h, M.transpose(-1, -2)).squeeze(-1)


def _contract_channels(x: Tensor, h: Tensor, constant: bool) -> Tensor:
    """Gradient of a B or C: sum of x (t b g r) times h (t b g r n) over r, or over t, b when it is constant."""
    if constant:
        return (x[..., None] * h).sum((0, 1))
    return torch.matmul(x[..., None, :], h)  # t b g 1 n


@torch.no_grad()
def forward(a, save):
    with torch.autocast(a.u.device.type, enabled=False):
        scan = _Scan(a)
        out = torch.empty_like(a.u)
        out_t = out.permute(2, 0, 1)
        h = scan.state(a.initial_state)
        starts = []
        for span in scan.spans():
            if save:
                starts.append(h.reshape(scan.b, scan.e, scan.n))
            c = scan.chunk(span)
            states = scan.states(c, h)
            y = _contract(states[1:], c.C)
            if scan.D is not None:
                y.addcmul_(scan.D, c.u)
            if a.z is not None:
                y.mul_(F.silu(scan.sequence(scan.z, span)))
            out_t[span] = y.flatten(2)
            h = states[-1].clone()  # not a view that keeps the chunk alive
        last = h.reshape(scan.b, scan.e, scan.n).clone()
        return (out, last), torch.stack(starts) if starts else saved(a) if save else None


@torch.no_grad()
def backward(a, starts, dout, dlast_state):
    with torch.autocast(a.u.device.type, enabled=False):
        scan = _Scan(a)
        grads = empty_gradients(a)
        dout_t, du_t, ddelta_t = (t.permute(2, 0, 1) for t in (dout, grads["u"], grads["delta"]))
        dA, dB_sum, dC_sum = torch.zeros_like(scan.A), torch.zeros_like(scan.A), torch.zeros_like(scan.A)
        dD, dbias = scan.A.new_zeros(scan.g, scan.r), scan.A.new_zeros(scan.g, scan.r)
        carry = scan.state(dlast_state)  # gradient of the state after the chunk at hand
        for k, span in reversed(list(enumerate(scan.spans()))):
            c = scan.chunk(span)
            states = scan.states(c, scan.state(starts[k]))
            dy = scan.sequence(dout_t, span)
            if a.z is not None:
                gate = scan.sequence(scan.z, span)
                y = _contract(states[1:], c.C)
                y = y if scan.D is None else y.addcmul_(scan.D, c.u)
                sigma = torch.sigmoid(gate)
                grads["z"].permute(2, 0, 1)[span] = (dy * y * sigma * (1 + gate * (1 - sigma))).flatten(2)
                dy = dy * gate * sigma
            gradient = c.C.expand(scan.A.shape) if a.C.ndim == 2 else c.C
            dh = dy[..., None] * gradient
            carry = _accumulate(dh, c, carry)
            if a.C.ndim == 2:
                dC_sum += _contract_channels(dy, states[1:], constant=True)
            else:
                grads["C"].permute(3, 0, 1, 2)[span] = _contract_channels(dy, states[1:], constant=False).squeeze(-2)
            x = c.dt * c.u
            if a.B.ndim == 2:
                dB_sum += _contract_channels(x, dh, constant=True)
            else:
                grads["B"].permute(3, 0, 1, 2)[span] = _contract_channels(x, dh, constant=False).squeeze(-2)
            dx = _contract(dh, c.B)
            before = states[:-1] if c.reset is None else states[:-1].masked_fill(c.reset, 0)
            dlog = dh.mul_(c.decay).mul_(before)  # gradient of dt A
            ddt = (dlog * scan.A).sum(-1).addcmul_(dx, c.u)
            dA += dlog.mul_(c.dt[..., None]).sum((0, 1))
            dx.mul_(c.dt)
            if scan.D is not None:
                dD += (dy * c.u).sum((0, 1))
                dx.addcmul_(dy, scan.D)
            if scan.softplus:
                ddt.mul_(torch.sigmoid(c.raw))
            if scan.bias is not None:
                dbias += ddt.sum((0, 1))
            du_t[span], ddelta_t[span] = dx.flatten(2), ddt.flatten(2)
        sums = {"A": dA, "D": dD, "delta_bias": dbias, "initial_state": carry}
        sums |= {name: total for name, M, total in (("B", a.B, dB_sum), ("C", a.C, dC_sum)) if M.ndim == 2}
        for name, total in sums.items():
            if name in grads:
                grads[name].copy_(total.reshape(grads[name].shape))
        return grads


def _accumulate(dh: Tensor, c: _Chunk, carry: Tensor) -> Tensor:
    """Run the adjoint recurrence in place on dh; return the gradient of the state before the chunk."""
    dh_at, decay_at = dh.unbind(), c.decay.unbind()
    for t in reversed(range(len(dh_at))):
        dh_at[t].add_(carry)
        carry = decay_at[t] * dh_at[t]
        if c.reset is not None:
            carry = carry.masked_fill(c.reset[t], 0)
    return carry


register(
    "torch",
    Kernel(forward, backward, saved),
    unsupported=why_not_complex,
    composite=selective_scan_fn.backends["reference"].function,
)
