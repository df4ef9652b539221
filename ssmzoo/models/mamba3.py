"""Mamba-3: the Mamba language model around a mixer with a second-order discretisation, a rotating state, and optionally
several inputs and outputs. The skeleton is that of ssmzoo/models/mamba.py.

    [z, x, B, C, dd_dt, dd_A, trap, ang] = W_in u           hp, hp, rgn, rgn, h, h, h, m; no convolution
    dt = softplus(dd_dt + dt_bias),  a = dt A,  A = min(-f(dd_A), -A_floor),  f(v) = 1 + v or 1 / (1 - v) for v < 0
    phase_t = phase_{t-1} + dt_t pi tanh(ang_t)             (h m) radians
    k = Rot(phase)(RMSNorm(B) + B_bias),  q = Rot(phase)(RMSNorm(C) + C_bias)
    S_t = e^{a_t} S_{t-1} + (1-lam_t) dt_t e^{a_t} x_{t-1} k_{t-1}^T + lam_t dt_t x_t k_t^T       lam = sigmoid(trap)
    y_t = S_t q_t + D x_t                                   gated by SiLU(z), after a norm per head if asked for

lam weighs the two ends of a time step: lam = 1 is Mamba-2, other values stand in for the removed convolution. The
rotation is a complex diagonal A in real arithmetic. With rank r > 1 (MIMO) every head writes r outer products and
reads r outputs per token, x and z entering and y leaving through the weights mimo_x, mimo_z, mimo_o.

b batch, l length, d d_model, h heads of p channels, n state size, g groups of B and C, r rank, m angles.
There is no short convolution, so nothing but the state is carried. The repository changed the activation of A over
time; this follows the piecewise function, so checkpoints of other dates may differ.
Source: arXiv 2603.15569; equations and parameter names of state-spaces/mamba modules/mamba3.py (Apache-2.0). SISO is
held to that code's own step reference; no reference values exist for MIMO outside of GPUs.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssmzoo.layers.init import dt_bias_
from ssmzoo.layers.norm import GatedRMSNorm, RMSNorm, fp32
from ssmzoo.layers.plain import is_plain
from ssmzoo.layers.program import Builder
from ssmzoo.layers.state import Padding, call_aligned, is_step, itemsize
from ssmzoo.models.mamba import MambaLM
from ssmzoo.ops import mamba3_step, rotary_trapezoidal_scan
from ssmzoo.ops.token_step import Register
from ssmzoo.ops.trapezoidal_scan import turned_heads

NORMS = frozenset({RMSNorm, GatedRMSNorm})
PHASE_CHUNK = 64  # tokens whose phases are summed before the sum is brought back into [0, 2 pi)


class Mamba3State(NamedTuple):
    phase: Tensor  # (b h m) fp32, radians
    ssm: Tensor  # (b h p n) fp32
    k: Tensor  # (b r h n) the last key, rotated
    x: Tensor  # (b h p) the last value


@dataclass
class Mamba3Init:
    """Range of the initial time step, in tokens."""

    dt_min: float = 0.001
    dt_max: float = 0.1
    dt_init_floor: float = 1e-4


class Mamba3(nn.Module):
    """Causal mixer (b l d) -> (b l d).

    d_model, d_state, expand, headdim, ngroups     d, n, d_inner / d, p, g
    rope_fraction        0.5 or 1: the part of the state that rotates
    is_outproj_norm      RMSNorm per head before the gate
    is_mimo, mimo_rank   r inputs and outputs per head instead of one
    A_floor              -A is at least this
    chunk_size           tokens per chunk of the scan; changes the speed, not the result
    init                 fields of Mamba3Init, by name
    """

    Options = Mamba3Init

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        expand: float = 2,
        headdim: int = 64,
        ngroups: int = 1,
        rope_fraction: float = 0.5,
        is_outproj_norm: bool = False,
        is_mimo: bool = False,
        mimo_rank: int = 4,
        A_floor: float = 1e-4,
        chunk_size: int = 64,
        **init,
    ):
        super().__init__()
        self.d_model, self.d_state, self.headdim, self.ngroups = d_model, d_state, headdim, ngroups
        self.d_inner, self.rank, self.chunk_size = int(expand * d_model), mimo_rank if is_mimo else 1, chunk_size
        if min(d_model, d_state, headdim, ngroups, self.rank, self.d_inner, chunk_size) < 1:
            raise ValueError(
                f"Mamba3 needs positive sizes, got d_model={d_model}, d_state={d_state}, expand={expand}, "
                f"headdim={headdim}, ngroups={ngroups}, mimo_rank={mimo_rank}, chunk_size={chunk_size}"
            )
        if rope_fraction not in (0.5, 1.0):
            raise ValueError(f"rope_fraction must be 0.5 or 1.0, got {rope_fraction}")
        self.nheads, rest = divmod(self.d_inner, headdim)
        if rest or self.nheads % ngroups:
            raise ValueError(
                f"headdim must divide the {self.d_inner} inner channels and ngroups the number of heads, "
                f"got headdim={headdim}, ngroups={ngroups}"
            )
        self.is_mimo, self.A_floor, self.init = is_mimo, A_floor, Mamba3Init(**init)
        self.n_angles = int(d_state * rope_fraction) // 2
        h, p, r, e = self.nheads, headdim, self.rank, self.d_inner
        self.widths = [e, e, r * ngroups * d_state, r * ngroups * d_state, h, h, h, self.n_angles]
        self.in_proj = nn.Linear(d_model, sum(self.widths), bias=False)
        self.dt_bias = nn.Parameter(torch.empty(h))
        self.B_bias = nn.Parameter(torch.empty(h, r, d_state))
        self.C_bias = nn.Parameter(torch.empty(h, r, d_state))
        self.B_norm, self.C_norm = RMSNorm(d_state), RMSNorm(d_state)
        self.D = nn.Parameter(torch.empty(h))
        if is_mimo:
            self.mimo_x, self.mimo_z, self.mimo_o = (nn.Parameter(torch.empty(h, r, p)) for _ in range(3))
        if is_outproj_norm:
            self.norm = GatedRMSNorm(e, group_size=p, norm_before_gate=True)
        else:
            self.norm = None
        self.out_proj = nn.Linear(e, d_model, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """dt log-uniform in [dt_min, dt_max]; biases of B and C, norms, D and mimo_z 1; mimo_x and mimo_o 1/r."""
        dt_bias_(self.dt_bias, *astuple(self.init))
        for weight in (self.B_bias, self.C_bias, self.D):
            nn.init.ones_(weight)
        if self.is_mimo:
            nn.init.ones_(self.mimo_z)
            nn.init.constant_(self.mimo_x, 1 / self.rank)
            nn.init.constant_(self.mimo_o, 1 / self.rank)

    def forward(
        self,
        x: Tensor,
        state: Mamba3State | None = None,
        *,
        mask: Tensor | Padding | None = None,
        seq_idx: Tensor | None = None,
    ) -> tuple[Tensor, Mamba3State]:
        if isinstance(mask, Tensor):
            return call_aligned(self.forward, x, state, mask, seq_idx)
        if is_step(x, state, mask, seq_idx) and self._fused():
            return self._step(x, state)
        z, x, B, C, dt, dd_A, trap, ang = self.in_proj(x).split(self.widths, dim=-1)
        dt = F.softplus(fp32(dt) + fp32(self.dt_bias))  # (b l h)
        if mask is not None:
            dt = dt * mask.mask[..., None]  # dt = 0: no decay, no rotation, no input
        dd_A, lam = fp32(dd_A), torch.sigmoid(fp32(trap))
        f = torch.where(dd_A >= 0, 1 + dd_A, 1 / (1 - dd_A.clamp(max=0)))
        a = dt * torch.clamp(-f, max=-self.A_floor)
        phase = self._phases(dt, ang, state, seq_idx)  # (b l h m)
        k, q = self._groups(B, self.B_norm), self._groups(C, self.C_norm)  # (b l r g n)
        v, z = (u.unflatten(-1, (self.nheads, self.headdim)) for u in (x, z))  # (b l h p)
        gamma, beta, start = lam * dt, (1 - lam) * dt, None
        if state is not None:  # with what the last token of the previous call adds in the first step of this one
            past = self._spread(fp32(state.x)[:, None]) * beta[:, 0, None, :, None]  # (b r h p)
            start = state.ssm + torch.einsum("brhp,brhn->bhpn", past, fp32(state.k))
        mimo = self.mimo_x if self.is_mimo else None
        turning = phase, self.B_bias, self.C_bias
        y, S = rotary_trapezoidal_scan(v, k, q, *turning, a, gamma, beta, self.D, mimo, start, seq_idx, self.chunk_size)
        y = self._merge(y, z).to(x.dtype)
        if mask is not None:
            y = y * mask.mask[..., None]
        return self.out_proj(y), self._last(phase, S, k, v, state, mask)

    def _fused(self) -> bool:
        """Whether one token may go through the operator that takes the weights of the inner modules."""
        norms = (self.B_norm, self.C_norm) if self.norm is None else (self.B_norm, self.C_norm, self.norm)
        return not self.is_mimo and is_plain(self.in_proj, self.out_proj) and is_plain(*norms, among=NORMS)

    def program(self, p: Builder, u: Register) -> Register:
        p.need(self._fused())
        h, d, n, m = self.nheads, self.headdim, self.d_state, self.n_angles
        states = p.state(h, m), p.state(h, d, n), p.state(1, h, n), p.state(h, d)
        weight, eps = (None, 0.0) if self.norm is None else (self.norm.weight, self.norm.eps)
        norms = self.B_norm.weight, self.C_norm.weight
        weights = (self.dt_bias, *norms, self.B_bias, self.C_bias, self.D, weight)
        factors = (self.A_floor, self.B_norm.eps, self.C_norm.eps, eps)
        more = dict(weights=weights, numbers=(h, d, n, m, self.ngroups), factors=factors, states=states)
        y = p.emit("mamba3", p.reg(self.d_inner), p.linear(self.in_proj, u), **more)
        return p.linear(self.out_proj, y)

    def _step(self, x: Tensor, state: Mamba3State) -> tuple[Tensor, Mamba3State]:
        """One token (b 1 d), without gradients."""
        weight, eps = (None, 0.0) if self.norm is None else (self.norm.weight, self.norm.eps)
        out, phase, S, k, v = mamba3_step(
            x[:, 0],
            state.phase,
            state.ssm,
            state.k[:, 0],
            state.x,
            self.in_proj.weight,
            self.dt_bias,
            self.B_norm.weight,
            self.C_norm.weight,
            self.B_bias[:, 0],
            self.C_bias[:, 0],
            self.D,
            weight,
            self.out_proj.weight,
            self.ngroups,
            self.A_floor,
            self.B_norm.eps,
            self.C_norm.eps,
            eps,
        )
        return out[:, None], Mamba3State(phase, S, k[:, None], v)

    def state_bytes(self, length: int) -> int:
        (size, wide), h, n = itemsize(self), self.nheads, self.d_state
        return h * (wide * (self.n_angles + self.headdim * n) + size * (self.rank * n + self.headdim))

    def _merge(self, y: Tensor, z: Tensor) -> Tensor:
        """Gate, norm and, for MIMO, the weighted sum over ranks. y (b l r h p), z (b l h p) -> (b l hp)"""
        z = self._gates(fp32(z)[:, :, None])
        if self.norm is not None:
            y = self.norm(y.flatten(3), z.flatten(3)).unflatten(-1, z.shape[3:])
        else:
            y = y * F.silu(z)
        if self.is_mimo:
            y = y * fp32(self.mimo_o).transpose(0, 1)
        return y.sum(2).flatten(2)

    def _spread(self, v: Tensor) -> Tensor:
        """(... 1 h p) -> (... r h p), each rank's share of the input."""
        return v * fp32(self.mimo_x).transpose(0, 1) if self.is_mimo else v

    def _gates(self, z: Tensor) -> Tensor:
        """(... 1 h p) -> (... r h p)"""
        return z * fp32(self.mimo_z).transpose(0, 1) if self.is_mimo else z

    def _groups(self, B: Tensor, norm: RMSNorm) -> Tensor:
        """Keys or queries (b l rgn) -> normalised (b l r g n)."""
        return fp32(norm(B.unflatten(-1, (self.rank, self.ngroups, self.d_state))))

    def _phases(self, dt: Tensor, ang: Tensor, state: Mamba3State | None, seq_idx: Tensor | None) -> Tensor:
        """Running sum of the rotations within each document, (b l h m) in [0, 2 pi)."""
        rotation = dt[..., None] * (math.pi * torch.tanh(fp32(ang)))[:, :, None]
        start = torch.zeros_like(rotation[:, 0]) if state is None else state.phase
        return phase_sums(rotation, start, seq_idx)

    def _last(self, phase, S, k, v, state, padding) -> Mamba3State:
        """State after the last real token of every row; rows without one keep theirs."""
        if padding is None:
            phase, k, v = (u[:, -1:] for u in (phase, k, v))
        else:
            rows, last = torch.arange(len(v), device=v.device)[:, None], padding.lengths[:, None] - 1
            phase, k, v = (u[rows, last] for u in (phase, k, v))
        k = turned_heads(k, fp32(self.B_bias), phase, not self.is_mimo).to(v.dtype)
        phase, k, v = (u[:, 0].contiguous() for u in (phase, k, v))  # a view would keep all tokens
        if padding is None:
            return Mamba3State(phase, S, k, v)
        old = (torch.zeros_like(phase), None, torch.zeros_like(k), torch.zeros_like(v)) if state is None else state
        some = padding.lengths > 0
        keep = [
            torch.where(some.view(-1, *[1] * (u.ndim - 1)), u, o)
            for u, o in zip((phase, k, v), (old[0], old[2], old[3]))
        ]
        return Mamba3State(keep[0], S, keep[1], keep[2])


def phase_sums(rotation: Tensor, start: Tensor, seq_idx: Tensor | None) -> Tensor:
    """start + cumulative sum of rotation (b l h m), modulo 2 pi, from zero again where seq_idx changes.

    Chunks are summed on their own, so that the error stays small however long the sequence; documents are separated by
    masks instead of differences, so that no gradient passes between them.
    """
    l = rotation.shape[1]
    q = min(PHASE_CHUNK, l)
    rotation = F.pad(rotation, (0, 0, 0, 0, 0, -l % q)).unflatten(1, (-1, q))  # (b c q h m)
    if seq_idx is None:
        sums = rotation.cumsum(2)
        ends = sums[:, :, -1] % (2 * math.pi)
        before = F.pad(ends[:, :-1], (0, 0, 0, 0, 1, 0)).cumsum(1) + start[:, None]
        return ((sums + before[:, :, None]) % (2 * math.pi)).flatten(1, 2)[:, :l]
    number = F.pad((seq_idx[:, 1:] != seq_idx[:, :-1]).long(), (1, 0)).cumsum(1)  # 0 continues `start`
    number = torch.cat([number, number[:, -1:].expand(-1, -l % q)], dim=1).unflatten(1, (-1, q))  # (b c q)
    same = (number[..., None] == number[:, :, None]).tril()  # (b c q q)
    sums = torch.einsum("bcts,bcshm->bcthm", same.to(rotation.dtype), rotation)
    ends, last = sums[:, :, -1] % (2 * math.pi), number[:, :, -1]  # (b c h m), (b c)
    chunks = torch.arange(last.shape[1], device=rotation.device)
    earlier = (number[..., None] == last[:, None, None]) & (chunks < chunks[:, None, None])  # (b c q c)
    before = torch.einsum("bctj,bjhm->bcthm", earlier.to(rotation.dtype), ends)
    before = before + torch.where((number == 0)[..., None, None], start[:, None, None], 0.0)
    return ((sums + before) % (2 * math.pi)).flatten(1, 2)[:, :l]


class Mamba3LM(MambaLM):
    """ids (b l) -> ModelOutput(logits (b l v), state, {}). Arguments of MambaLM; `ssm_cfg` are those of Mamba3."""

    mixer = Mamba3
