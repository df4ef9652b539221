"""Gated SSM: a linear recurrence, its gates and an output gate in one layer, with no feed-forward layer beside it.

    f = sigmoid(W_f x),   u = sigmoid(W_i x) * W_z x,   o = GeLU(W_o x)                 all (n)
    h_t = f_t h_{t-1} + u_t,   y = W_out (o * h)

A bidirectional layer runs half of the channels backwards over the prefix (layers/mixers/two_way.py).
`ReleasedGatedSSM` is the module of the released reward model, where the state decays with the gate of one step before:

    K = sigmoid(W_K x),   [v, i, o] = W x,   u = v sigmoid(i) (1 - K)
    s_t = K_{t-1} s_{t-1} + u_t,   y = W_out (s sigmoid(o))

b batch, l length, d d_model, n d_state, m channels that run forwards.
Source: Blouir et al. 2024 (arXiv 2411.01030), section 3.1 and appendix A.16; samblouir/birdie for the released form.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssmzoo.layers.mixers.two_way import document_starts, forward_channels, two_way
from ssmzoo.layers.norm import fp32
from ssmzoo.layers.program import Builder
from ssmzoo.layers.state import Padding, call_aligned, itemsize
from ssmzoo.ops import gated_linear_recurrence
from ssmzoo.ops.token_step import Register


class GatedSSMState(NamedTuple):
    h: Tensor  # (b m) fp32; of the released form, decayed by the last gate already


def check_sizes(layer: nn.Module, d_model: int, d_state: int) -> None:
    if min(d_model, d_state) < 1:
        raise ValueError(f"{type(layer).__name__} needs positive sizes, got d_model={d_model}, d_state={d_state}")


class GatedSSM(nn.Module):
    """Causal mixer (b l d) -> (b l d) that may read a prefix in both directions.

    bidirectional   half of the channels run backwards over the prefix
    bias            of all projections

    Initialisation is torch's for a Linear: the paper states none.
    """

    packed_prefix = True

    def __init__(self, d_model: int, d_state: int, bidirectional: bool = False, bias: bool = True):
        super().__init__()
        check_sizes(self, d_model, d_state)
        self.d_state, self.m = d_state, forward_channels(d_state, bidirectional)
        self.W_f, self.W_z_gate, self.W_z, self.W_out_gate = (nn.Linear(d_model, d_state, bias) for _ in range(4))
        self.W_out = nn.Linear(d_state, d_model, bias)

    def forward(
        self,
        x: Tensor,
        state: GatedSSMState | None = None,
        *,
        mask: Tensor | Padding | None = None,
        seq_idx: Tensor | None = None,
        prefix: Tensor | None = None,
    ) -> tuple[Tensor, GatedSSMState]:
        if isinstance(mask, Tensor):
            return call_aligned(self.forward, x, state, mask, seq_idx, prefix=prefix)
        f = torch.sigmoid(fp32(self.W_f(x)))  # (b l n), recurrences run in fp32
        u = torch.sigmoid(self.W_z_gate(x)) * self.W_z(x)
        before = None if state is None else state.h
        h, last = two_way(f, fp32(u), before, self.m, padding=mask, seq_idx=seq_idx, prefix=prefix)
        o = F.gelu(self.W_out_gate(x), approximate="tanh")
        return self.W_out(o * h.to(o.dtype)), GatedSSMState(last)

    def program(self, p: Builder, x: Register) -> Register:
        f, gate = p.linear(self.W_f, x, "sigmoid"), p.linear(self.W_z_gate, x, "sigmoid")
        u = p.mix(gate, p.linear(self.W_z, x))
        h = p.emit("recur", p.reg(self.d_state), f, u, numbers=(self.m,), states=(p.state(self.m),))
        return p.linear(self.W_out, p.mix(p.linear(self.W_out_gate, x), h, act="gelu_tanh"))

    def state_bytes(self, length: int) -> int:
        return self.m * itemsize(self)[1]


class ReleasedGatedSSM(nn.Module):
    """Causal mixer (b l d) -> (b l d), as released: no biases, the decay one step late, one direction only."""

    def __init__(self, d_model: int, d_state: int):
        super().__init__()
        check_sizes(self, d_model, d_state)
        self.d_state = d_state
        self.K_proj = nn.Linear(d_model, d_state, bias=False)
        self.ugg_proj = nn.Linear(d_model, 3 * d_state, bias=False)
        self.out_proj = nn.Linear(d_state, d_model, bias=False)

    def forward(
        self,
        x: Tensor,
        state: GatedSSMState | None = None,
        *,
        mask: Tensor | Padding | None = None,
        seq_idx: Tensor | None = None,
    ) -> tuple[Tensor, GatedSSMState]:
        if isinstance(mask, Tensor):
            return call_aligned(self.forward, x, state, mask, seq_idx)
        gate = torch.sigmoid(fp32(self.K_proj(x)))  # K (b l n)
        v, g_in, g_out = self.ugg_proj(x).chunk(3, dim=-1)
        u = fp32(v * torch.sigmoid(g_in)) * (1 - gate)
        if mask is not None:
            gate = gate.masked_fill(~mask.mask[..., None], 1)
            u = u.masked_fill(~mask.mask[..., None], 0)
        late = F.pad(gate[:, :-1], (0, 0, 1, 0), value=1.0)  # K_{t-1}; the state given has decayed already
        late = late.masked_fill(document_starts(True, seq_idx, x)[..., None], 0)
        s = gated_linear_recurrence(late, u, initial_state=None if state is None else state.h)
        y = self.out_proj(s.to(g_out.dtype) * torch.sigmoid(g_out))
        return y, GatedSSMState(gate[:, -1] * s[:, -1])

    def state_bytes(self, length: int) -> int:
        return self.d_state * itemsize(self)[1]


class ScaledNorm(nn.Module):
    """y = x / (sqrt(mean(x^2)) + eps) * norm.scale * scale, the released form's norm with its two vectors.

    (... d) -> (... d); the first vector starts at 1, the second at 0.1.
    """

    def __init__(self, dim: int, eps: float = 1e-8):
        super().__init__()
        self.eps = eps
        self.norm = nn.ParameterDict({"scale": nn.Parameter(torch.ones(dim))})
        self.scale = nn.Parameter(torch.full((dim,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        wide = fp32(x)
        wide = wide / (wide.square().mean(-1, keepdim=True).sqrt() + self.eps)
        return (wide * self.norm["scale"] * self.scale).to(self.scale.dtype)
