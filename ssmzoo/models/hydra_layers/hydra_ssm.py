"""The two sequence layers of Hydra: an elementwise recurrence, and the gated convolution that stands in for it.

    recurrent   [delta, B, C, U] = W x;   alpha_t = exp(-softplus(delta_t) softplus(lambda))
                y_t = C_t s_{t-1} + W_skip x_t;   s_t = alpha_t s_{t-1} + B_t U_t        read before it is written
    conv        [v, g] = W x;   y = sigmoid(g) conv_k(v) + (1 - sigmoid(g)) v            causal, depthwise

Both end with a LayerNorm. b batch, l length, d width and state size, k taps.
Source: arXiv 2508.15099; sidcraftscode/Hydra, toy_hydra.py, for names.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssmzoo.layers.mixers.short_conv import short_conv
from ssmzoo.layers.norm import fp32
from ssmzoo.layers.program import Builder
from ssmzoo.layers.state import Padding, call_aligned, itemsize
from ssmzoo.ops import gated_linear_recurrence
from ssmzoo.ops.checks import resets
from ssmzoo.ops.token_step import Register


class ElementwiseState(NamedTuple):
    s: Tensor  # (b d) fp32


class ElementwiseSSM(nn.Module):
    """Causal mixer (b l d) -> (b l d) with one number of state per channel."""

    def __init__(self, d_model: int):
        super().__init__()
        self.proj = nn.Linear(d_model, 4 * d_model, bias=False)
        self.lambda_base = nn.Parameter(torch.ones(d_model))
        self.skip = nn.Linear(d_model, d_model, bias=False)
        self.out_ln = nn.LayerNorm(d_model)

    def forward(
        self,
        x: Tensor,
        state: ElementwiseState | None = None,
        *,
        mask: Tensor | Padding | None = None,
        seq_idx: Tensor | None = None,
    ) -> tuple[Tensor, ElementwiseState]:
        if isinstance(mask, Tensor):
            return call_aligned(self.forward, x, state, mask, seq_idx)
        delta, B, C, U = fp32(self.proj(x)).chunk(4, dim=-1)
        alpha, fed = torch.exp(-F.softplus(delta) * F.softplus(fp32(self.lambda_base))), B * U  # (b l d)
        begins = None if seq_idx is None else resets(seq_idx)[..., None]
        if begins is not None:
            alpha = alpha.masked_fill(begins, 0)
        if mask is not None:
            alpha, fed = alpha.masked_fill(~mask.mask[..., None], 1), fed * mask.mask[..., None]
        first = torch.zeros_like(fed[:, 0]) if state is None else state.s.to(fed.dtype)
        s = gated_linear_recurrence(alpha, fed, initial_state=first)
        before = torch.cat([first[:, None], s[:, :-1]], dim=1)  # s_{t-1}
        before = before if begins is None else before.masked_fill(begins, 0)
        return self.out_ln((C * before).to(x.dtype) + self.skip(x)), ElementwiseState(s[:, -1].clone())

    def program(self, p: Builder, x: Register) -> Register:
        proj, d = p.linear(self.proj, x), x.size
        y = p.emit("element", p.reg(d), proj, weights=(self.lambda_base,), states=(p.state(d),))
        p.add(y, p.linear(self.skip, x))
        return p.norm(self.out_ln, y)

    def state_bytes(self, length: int) -> int:
        return len(self.lambda_base) * itemsize(self)[1]


class GatedConvState(NamedTuple):
    conv: Tensor  # (b d k) the last k inputs of the convolution, oldest first


class GatedConv(nn.Module):
    """Causal mixer (b l d) -> (b l d) that sees d_conv tokens; its convolution is zero at first."""

    def __init__(self, d_model: int, d_conv: int = 8):
        super().__init__()
        if d_conv < 1:
            raise ValueError(f"d_conv = {d_conv} must be at least 1")
        self.d_conv = d_conv
        self.in_proj = nn.Linear(d_model, 2 * d_model, bias=False)
        self.dw_conv = nn.Conv1d(d_model, d_model, d_conv, groups=d_model, bias=False)
        self.out_ln = nn.LayerNorm(d_model)
        nn.init.zeros_(self.dw_conv.weight)

    def forward(
        self,
        x: Tensor,
        state: GatedConvState | None = None,
        *,
        mask: Tensor | Padding | None = None,
        seq_idx: Tensor | None = None,
    ) -> tuple[Tensor, GatedConvState]:
        if isinstance(mask, Tensor):
            return call_aligned(self.forward, x, state, mask, seq_idx)
        v, gate = self.in_proj(x).chunk(2, dim=-1)
        past = None if state is None else state.conv
        y, window = short_conv(self.dw_conv, v.transpose(1, 2), past, self.d_conv, mask, seq_idx, activation=None)
        return self.out_ln(torch.lerp(v, y.transpose(1, 2), gate.sigmoid())), GatedConvState(window)

    def program(self, p: Builder, x: Register) -> Register:
        v, gate = p.linear(self.in_proj, x).split(x.size, x.size)
        y = p.mix(v, c=p.conv(self.dw_conv, v, "none"), factors=(-1.0, 1.0))
        return p.norm(self.out_ln, p.mix(gate, y, v, act="sigmoid"))

    def state_bytes(self, length: int) -> int:
        return self.out_ln.weight.numel() * self.d_conv * itemsize(self)[0]
