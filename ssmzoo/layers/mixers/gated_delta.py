"""Mixers around the gated delta rule: Gated DeltaNet (one decay per head) and Kimi delta attention (one per channel).

    q, k, v = SiLU(causal depthwise conv(W x)) per head;   q, k divided by their lengths, q also by sqrt(n)
    beta = sigmoid(W_b x), or twice that
    S <- exp(g) S,   S <- S + beta k (v - S^T k)^T,   o = S^T q                            (ops.gated_delta_rule)
    y = W_o ( RMSNorm(o) act(gate) )                                                        norm per head

    Gated DeltaNet   g = -exp(A_log) softplus(W_a x + dt_bias)         (h)     gate = W_g x,             act = SiLU
    Kimi             g = -exp(A_log) softplus(W_f2 W_f1 x + dt_bias)   (h n)   gate = W_g2 W_g1 x + b,   act = sigmoid

b batch, l length, d width, h heads, n width of a key, p width of a value, k taps of the convolution.
The three convolutions of the sources are one here, over [q | k | v], and so are the projections from x.
Source: Yang et al. 2024 (arXiv 2412.06464), Kimi Linear (arXiv 2510.26692); twice beta: Grazzi et al. 2024 (arXiv
2411.12537); fla-org/flash-linear-attention layers/{gated_deltanet,kda}.py for defaults and initial values.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssmzoo.layers.init import A_log_uniform_, dt_bias_
from ssmzoo.layers.mixers.short_conv import short_conv
from ssmzoo.layers.norm import GatedRMSNorm, fp32
from ssmzoo.layers.plain import is_plain
from ssmzoo.layers.program import Builder
from ssmzoo.layers.state import Padding, call_aligned, is_step, itemsize
from ssmzoo.ops import gated_delta_rule, gated_delta_step
from ssmzoo.ops.token_step import Register

EPS = 1e-6  # under the root of the lengths of q and k


class GatedDeltaState(NamedTuple):
    conv: Tensor  # (b 2hn+hp k) the last k inputs of the convolution, oldest first
    S: Tensor  # (b h n p) fp32


class GatedDeltaNet(nn.Module):
    """Causal mixer (b l d) -> (b l d).

    num_heads, head_dim, expand_v   heads of q and k, n, and p / n; p = int(expand_v n)
    num_v_heads        h, a multiple of num_heads (default the same): heads of v, which share q and k in groups
    conv_size          k
    allow_neg_eigval   beta in (0, 2) instead of (0, 1): the state may change sign, which automata such as parity need
    """

    per_channel, gate_activation, A_range = False, "silu", (1e-4, 16.0)

    def __init__(
        self,
        d_model: int,
        num_heads: int = 6,
        head_dim: int = 256,
        expand_v: float = 2.0,
        num_v_heads: int | None = None,
        conv_size: int = 4,
        allow_neg_eigval: bool = False,
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        self.num_heads, self.heads = num_heads, num_v_heads or num_heads
        self.n, self.p = head_dim, int(expand_v * head_dim)
        if min(d_model, num_heads, self.n, self.p, conv_size) < 1 or self.heads % num_heads:
            raise ValueError(
                f"{type(self).__name__} needs positive sizes and num_v_heads a multiple of num_heads, got {d_model=}, "
                f"{num_heads=}, {head_dim=}, {expand_v=}, {num_v_heads=}, {conv_size=}"
            )
        self.conv_size, self.allow_neg_eigval = conv_size, allow_neg_eigval
        self.qkv = [num_heads * self.n, num_heads * self.n, self.heads * self.p]
        channels = sum(self.qkv)
        self.widths, decays = [channels, *self.gate_widths()], self.heads * (self.n if self.per_channel else 1)
        self.in_proj = nn.Linear(d_model, sum(self.widths), bias=False)
        self.conv1d = nn.Conv1d(channels, channels, conv_size, groups=channels, bias=False)
        self.A_log = nn.Parameter(torch.empty(self.heads))
        self.dt_bias = nn.Parameter(torch.empty(decays))
        self.norm = GatedRMSNorm(self.p, norm_eps, norm_before_gate=True, activation=self.gate_activation)
        self.out_proj = nn.Linear(self.heads * self.p, d_model, bias=False)
        self.reset_parameters()

    def gate_widths(self) -> list[int]:
        """Outputs of in_proj behind those of q, k and v: for the gate, beta and the decay."""
        return [self.heads * self.p, self.heads, self.heads]

    def reset_parameters(self) -> None:
        """exp(A_log) ~ U(A_range), dt log-uniform in [1e-3, 0.1]; torch's default for the rest."""
        A_log_uniform_(self.A_log, *self.A_range)
        dt_bias_(self.dt_bias)

    def gates(self, gate: Tensor, decay: Tensor) -> tuple[Tensor, Tensor]:
        """Of the outputs of in_proj -> the gate (b l h p), g (b l h)."""
        g = -fp32(self.A_log).exp() * F.softplus(fp32(decay) + fp32(self.dt_bias))
        return gate.unflatten(-1, (self.heads, self.p)), g

    def forward(
        self,
        x: Tensor,
        state: GatedDeltaState | None = None,
        *,
        mask: Tensor | Padding | None = None,
        seq_idx: Tensor | None = None,
    ) -> tuple[Tensor, GatedDeltaState]:
        if isinstance(mask, Tensor):
            return call_aligned(self.forward, x, state, mask, seq_idx)
        if is_step(x, state, mask, seq_idx) and self._fused():
            return self._step(x, state)
        past, S = (None, None) if state is None else state
        qkv, gate, beta, decay = self.in_proj(x).split(self.widths, dim=-1)
        qkv, conv = short_conv(self.conv1d, qkv.transpose(1, 2), past, self.conv_size, mask, seq_idx)
        gate, g = self.gates(gate, decay)
        beta = (1 + self.allow_neg_eigval) * fp32(beta).sigmoid()  # (b l h)
        if mask is not None:  # no decay, no input
            real = mask.mask[..., None]
            beta, g = beta * real, g * (real if g.ndim == 3 else real[..., None])
        y, S = gated_delta_rule(*self.heads_of(qkv.transpose(1, 2)), g, beta, S, seq_idx)  # (b l h p)
        y = self.norm(y, gate).flatten(2)
        return self.out_proj(y if mask is None else y * real), GatedDeltaState(conv, S)

    def heads_of(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(b l 2hn+hp) -> q (scaled) and k of length 1 (b l h n), v (b l h p)."""
        qk, v = qkv.split([2 * self.qkv[0], self.qkv[2]], dim=-1)
        qk, v = fp32(qk.unflatten(-1, (-1, self.n))), v.unflatten(-1, (-1, self.p))
        q, k = (qk * (qk.square().sum(-1, keepdim=True) + EPS).rsqrt()).chunk(2, dim=2)
        q = q * self.n**-0.5
        if (repeats := self.heads // self.num_heads) > 1:
            q, k = (t.repeat_interleave(repeats, dim=2) for t in (q, k))
        return q, k, v

    def bottlenecks(self) -> tuple[nn.Linear, ...]:
        """Modules between in_proj and the decay, and between in_proj and the gate."""
        return ()

    def _fused(self) -> bool:
        """Whether one token may go through the operator that takes the weights of the inner modules."""
        plain = is_plain(self.in_proj, self.conv1d, self.out_proj, *self.bottlenecks())
        biases = (self.in_proj.bias, self.conv1d.bias, self.out_proj.bias) if plain else ()
        return plain and biases == (None, None, None) and is_plain(self.norm, among={GatedRMSNorm})

    def _step(self, x: Tensor, state: GatedDeltaState) -> tuple[Tensor, GatedDeltaState]:
        """One token (b 1 d), without gradients."""
        decay, gate = self.bottlenecks() or (None, None)
        out, conv, S = gated_delta_step(
            x[:, 0],
            *state,
            self.in_proj.weight,
            self.conv1d.weight.squeeze(1),
            self.A_log,
            self.dt_bias,
            self.norm.weight,
            self.out_proj.weight,
            None if decay is None else decay.weight,
            None if gate is None else gate.weight,
            None if gate is None else gate.bias,
            self.num_heads,
            1.0 + self.allow_neg_eigval,
            self.norm.eps,
        )
        return out[:, None], GatedDeltaState(conv, S)

    def program(self, p: Builder, x: Register) -> Register:
        qkv, gate, beta, decay = p.linear(self.in_proj, x).split(*self.widths)
        qkv = p.conv(self.conv1d, qkv)
        if self.bottlenecks():
            f_proj, g_proj = self.bottlenecks()
            decay, gate = p.linear(f_proj, decay), p.linear(g_proj, gate)
        numbers = self.num_heads, self.heads, self.n, self.p, self.per_channel
        more = dict(weights=(self.A_log, self.dt_bias), numbers=numbers, factors=(1.0 + self.allow_neg_eigval,))
        states = (p.state(self.heads, self.n, self.p),)
        y = p.emit("delta", p.reg(self.heads * self.p), qkv, beta, decay, states=states, **more)
        return p.linear(self.out_proj, p.gated_norm(self.norm, y, gate))

    def state_bytes(self, length: int) -> int:
        size, wide = itemsize(self)
        return sum(self.qkv) * self.conv_size * size + self.heads * self.n * self.p * wide


class KimiDeltaAttention(GatedDeltaNet):
    """The same with a decay for every channel of the keys; decay and gate go through a bottleneck of p channels.

    Arguments as `GatedDeltaNet`, whose defaults differ from those of the paper: 16 heads of 128, expand_v 1.
    """

    per_channel, gate_activation, A_range = True, "sigmoid", (1.0, 16.0)

    def __init__(self, d_model: int, num_heads: int = 16, head_dim: int = 128, expand_v: float = 1.0, **more):
        super().__init__(d_model, num_heads, head_dim, expand_v, **more)
        self.g_proj = nn.Linear(self.p, self.heads * self.p)
        self.f_proj = nn.Linear(self.p, self.heads * self.n, bias=False)

    def gate_widths(self) -> list[int]:
        return [self.p, self.heads, self.p]

    def bottlenecks(self) -> tuple[nn.Linear, ...]:
        return self.f_proj, self.g_proj

    program = GatedDeltaNet.program

    def gates(self, gate: Tensor, decay: Tensor) -> tuple[Tensor, Tensor]:
        """Of the bottlenecks (b l p) -> the gate (b l h p), g (b l h n)."""
        dt = F.softplus(fp32(self.f_proj(decay)) + fp32(self.dt_bias)).unflatten(-1, (self.heads, self.n))
        return self.g_proj(gate).unflatten(-1, (self.heads, self.p)), -fp32(self.A_log).exp()[:, None] * dt
