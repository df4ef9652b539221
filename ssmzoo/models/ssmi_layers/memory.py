"""The memory that SSMI puts between attention and feed-forward.

    x = W_down LN(a)   text, (b t r)         v = W_v LN(V)   visual tokens, (b m r)
    y = SSM([v ; x]), the last t positions   (inject: prefix)
    y = SSM(x + mean over m of v)            (inject: add)
    y = SSM(x)                               (inject: none)
    Memory(a, V) = gamma * W_up y            W_up 0 and gamma 1 at the start

The visual tokens are read once: the state behind them is where the text begins, and goes from chunk to chunk like any
other state. SSM is a Mamba-1 mixer, or, without selection, h_t = exp(dt A) h_{t-1} + dt B x_t, y_t = <C, h_t> + D x_t
with constant dt, B and C per channel. A memory must hold a picture for as long as a text lasts: dt starts between
DT_MIN and DT_MAX and A at -1/SLOW .. -n/SLOW, where a language model's first dt would hardly let a picture in. The
paper has the constant form; selection, norms, gamma, W_up, the start and the residual around the memory are ours. It
computes in float32 whatever the precision of the model around it.

b batch, t text, m visual tokens, d model width, w visual width, r bottleneck, n state.
Source: SSMI (arXiv 2412.09875), layer rule and constant form; there is no released code.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssmzoo.layers.init import A_log_s4d_real_, dt_bias_
from ssmzoo.layers.mixers.mamba import NO_STEP, Mamba, MambaState
from ssmzoo.layers.state import Padding, call_aligned, itemsize
from ssmzoo.ops import selective_scan_fn
from ssmzoo.suggest import nearest

DT_MIN, DT_MAX, SLOW = 0.1, 1.0, 64.0
INJECT, GAMMA = ("prefix", "add", "none"), ("scalar", "channel")


class MemoryState(NamedTuple):
    conv: Tensor  # (b e k) the last inputs of the convolution; (b r 0) without selection
    ssm: Tensor  # (b e n)
    seen: Tensor  # (b r) mean of the visual tokens, 0 unless inject is add


class ConstantSSM(nn.Module):
    """Causal mixer (b l r) -> (b l r) whose dt, B and C do not depend on the input; a state of n per channel."""

    def __init__(self, d_model: int, d_state: int):
        super().__init__()
        self.d_model, self.d_state = d_model, d_state
        self.dt_bias = nn.Parameter(dt_bias_(torch.empty(d_model), DT_MIN, DT_MAX))
        self.A_log = nn.Parameter(A_log_s4d_real_(torch.empty(d_model, d_state)))
        self.B = nn.Parameter(torch.ones(d_model, d_state))
        self.C = nn.Parameter(torch.randn(d_model, d_state) / d_state**0.5)
        self.D = nn.Parameter(torch.ones(d_model))

    def forward(
        self, x: Tensor, state: MambaState | None = None, *, mask: Tensor | Padding | None = None
    ) -> tuple[Tensor, MambaState]:
        if isinstance(mask, Tensor):
            return call_aligned(self._called, x, state, mask, None)
        dt = torch.zeros_like(x)  # the scan adds the bias
        if mask is not None:
            dt = dt.masked_fill(~mask.mask[..., None], NO_STEP)
        y, h = selective_scan_fn(
            x.mT,
            dt.mT,
            -torch.exp(self.A_log),
            self.B,
            self.C,
            self.D,
            delta_bias=self.dt_bias,
            delta_softplus=True,
            return_last_state=True,
            initial_state=None if state is None else state.ssm,
        )
        y = y.mT if mask is None else y.mT * mask.mask[..., None]
        return y, MambaState(x.new_zeros(len(x), self.d_model, 0), h)

    def _called(
        self, x: Tensor, state: MambaState | None, *, mask: Padding, seq_idx: None
    ) -> tuple[Tensor, MambaState]:
        return self.forward(x, state, mask=mask)

    def state_bytes(self, length: int) -> int:
        return self.d_model * self.d_state * itemsize(self)[1]


class Memory(nn.Module):
    """Causal mixer a (b t d) -> gamma * W_up y (b t d), state; `read` makes the state of visual tokens.

    d_model, visual_dim  d, w
    rank, d_state        r, n
    expand               inner width of Mamba over r; only with selection
    inject               prefix | add | none, as above
    selective            Mamba, or the constant form
    gamma                scalar | channel: one factor, or one a channel
    """

    def __init__(
        self,
        d_model: int,
        visual_dim: int,
        rank: int = 64,
        d_state: int = 16,
        expand: float = 1,
        inject: str = "prefix",
        selective: bool = True,
        gamma: str = "scalar",
    ):
        super().__init__()
        for name, value, known in (("inject", inject, INJECT), ("gamma", gamma, GAMMA)):
            if value not in known:
                raise ValueError(f"{name} is {value!r}{nearest(str(value), known)}; choose one of {', '.join(known)}")
        if min(d_model, visual_dim, rank, d_state) < 1:
            raise ValueError(
                f"a memory needs positive sizes, got d_model={d_model}, visual_dim={visual_dim}, rank={rank}, "
                f"d_state={d_state}"
            )
        self.visual_dim, self.rank, self.inject = visual_dim, rank, inject
        self.norm, self.down = nn.LayerNorm(d_model), nn.Linear(d_model, rank, bias=False)
        self.visual_norm = None if inject == "none" else nn.LayerNorm(visual_dim)
        self.visual = None if inject == "none" else nn.Linear(visual_dim, rank, bias=False)
        times = {"dt_min": DT_MIN, "dt_max": DT_MAX}
        self.ssm = Mamba(rank, d_state, expand=expand, **times) if selective else ConstantSSM(rank, d_state)
        self.up = nn.Linear(rank, d_model, bias=False)
        self.gamma = nn.Parameter(torch.ones(() if gamma == "scalar" else d_model))
        nn.init.zeros_(self.up.weight)
        with torch.no_grad():
            self.ssm.A_log -= math.log(SLOW)

    def read(self, visual: Tensor) -> MemoryState | None:
        """The state behind visual tokens (b m w), where a text begins; None when nothing is injected."""
        return None if self.inject == "none" else self._read(visual)[1]

    def reconstruction(self, visual: Tensor) -> Tensor:
        """Scalar: mean square between every visual token's LN and what W_v's transpose makes of y one token before.

        Only the prefix form reads the tokens one after the other: 0 for the others, and for a single token."""
        if self.inject != "prefix" or visual.shape[1] < 2:
            return visual.new_zeros((), dtype=torch.float32)
        y, _ = self._read(visual)
        aim = F.layer_norm(visual.float(), (self.visual_dim,))
        return F.mse_loss(y[:, :-1] @ self.visual.weight, aim[:, 1:])

    def _read(self, visual: Tensor) -> tuple[Tensor, MemoryState]:
        if visual.ndim != 3 or visual.shape[-1] != self.visual_dim or not visual.shape[1]:
            raise ValueError(
                f"visual has shape {tuple(visual.shape)}; expected (batch, tokens, {self.visual_dim}), tokens > 0"
            )
        v = self.visual(self.visual_norm(visual.to(self.up.weight.dtype)))  # (b m r)
        if self.inject == "add":
            return v, MemoryState(*self._fresh(v), v.mean(1))
        y, after = self.ssm(v)
        return y, MemoryState(*after, torch.zeros_like(v[:, 0]))

    def _fresh(self, v: Tensor) -> MambaState:
        """The state in front of any token."""
        if isinstance(self.ssm, ConstantSSM):
            return MambaState(v.new_zeros(len(v), self.rank, 0), v.new_zeros(len(v), self.rank, self.ssm.d_state))
        e = self.ssm.d_inner
        return MambaState(v.new_zeros(len(v), e, self.ssm.d_conv), v.new_zeros(len(v), e, self.ssm.d_state))

    def forward(
        self, a: Tensor, state: MemoryState | None = None, *, mask: Tensor | Padding | None = None, seq_idx=None
    ) -> tuple[Tensor, MemoryState]:
        if seq_idx is not None:
            raise ValueError("seq_idx: a memory reads one text per row, not packed documents")
        x = self.down(self.norm(a.to(self.up.weight.dtype)))  # (b t r)
        seen = torch.zeros_like(x[:, 0]) if state is None else state.seen
        if self.inject == "add":
            x = x + seen[:, None]
        y, after = self.ssm(x, None if state is None else MambaState(*state[:2]), mask=mask)
        return (self.gamma * self.up(y)).to(a.dtype), MemoryState(*after, seen)

    def state_bytes(self, length: int) -> int:
        """Of what stands beside the scan, which tells its own."""
        return self.rank * itemsize(self)[0]
