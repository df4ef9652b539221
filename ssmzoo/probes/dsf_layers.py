"""Plain sequence mixers of the dynamical-systems view: attention, linear and normalised attention, S6, SSD, quasi-LSTM.

Each is a causal map (b l d) -> (b l d) that the framework writes h_i = Lam_i h_{i-1} + B_i u_i, y_i = C_i h_i + D u_i
(see ssmzoo.probes.dsf). They are bare: no short convolution, gate or norm around them except where the paper has one,
and they compare mixers on whole sequences, so they carry no state from call to call.

b batch, l length, d width, m width of queries and keys over all heads, h heads, n state size, e inner width.
Source: Sieber et al. 2024 (arXiv 2405.15731); IntelligentControlSystems/dsf-mqar (Apache-2.0) for parameter names.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssmzoo.layers.init import A_log_s4d_real_, MambaInit, time_step_rank
from ssmzoo.layers.norm import fp32
from ssmzoo.ops import causal_conv1d_fn, selective_scan_fn


class CausalMixing(nn.Module):
    """Multi-head y = W_o concat_h(Phi_h(x) v_h), Phi (l l) lower triangular; subclasses say what Phi is.

    d_model, d_qk, num_heads   d, m (default d), h; both widths must be divisible by h
    bias, dropout              of all projections; on the weights Phi while training
    """

    def __init__(
        self, d_model: int, d_qk: int | None = None, num_heads: int = 1, bias: bool = True, dropout: float = 0.0
    ):
        super().__init__()
        self.d_qk, self.num_heads = d_qk or d_model, num_heads
        if num_heads < 1 or d_model % num_heads or self.d_qk % num_heads:
            raise ValueError(f"num_heads={num_heads} must divide d_model={d_model} and d_qk={self.d_qk}")
        self.Wqk = nn.Linear(d_model, 2 * self.d_qk, bias=bias)
        self.Wv = nn.Linear(d_model, d_model, bias=bias)
        self.out_proj = nn.Linear(d_model, d_model, bias=bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        v = self.Wv(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (b h l p)
        y = self.dropout(self.mixing_matrix(x)) @ v
        return self.out_proj(y.transpose(1, 2).flatten(2))

    def queries_and_keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(b h l m/h) each"""
        return self.Wqk(x).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def mixing_matrix(self, x: Tensor) -> Tensor:
        """Phi (b h l l): what multiplies the values."""
        raise NotImplementedError(f"{type(self).__name__} must define mixing_matrix(x)")


class SoftmaxAttention(CausalMixing):
    """Phi = softmax(q k^T sqrt(h / m)) over the past."""

    def mixing_matrix(self, x: Tensor) -> Tensor:
        q, k = self.queries_and_keys(x)
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        return scores.masked_fill(future, -torch.inf).softmax(-1)


class LinearAttention(CausalMixing):
    """Phi[i, j] = phi(q_i)^T phi(k_j) / sum_j' phi(q_i)^T phi(k_j'), phi = ELU + 1."""

    def mixing_matrix(self, x: Tensor) -> Tensor:
        q, k = (F.elu(t) + 1 for t in self.queries_and_keys(x))
        weights = (q @ k.transpose(-1, -2)).tril()
        return weights / weights.sum(-1, keepdim=True)


class NormalizedAttention(CausalMixing):
    """Phi[i, j] = q_i^T k_j / exp(w_n^T x_i + b_n): no feature map, and a normaliser learned from the token alone."""

    def __init__(
        self, d_model: int, d_qk: int | None = None, num_heads: int = 1, bias: bool = True, dropout: float = 0.0
    ):
        super().__init__(d_model, d_qk, num_heads, bias, dropout)
        self.Wn = nn.Linear(d_model, num_heads, bias=bias)

    def mixing_matrix(self, x: Tensor) -> Tensor:
        q, k = self.queries_and_keys(x)
        return (q @ k.transpose(-1, -2)).tril() * torch.exp(-self.Wn(x)).transpose(1, 2)[..., None]


class S6(nn.Module):
    """Mamba's selective scan alone: x -> W_o scan(x); the arguments are those of ssmzoo.layers.mixers.mamba.Mamba."""

    def __init__(
        self, d_model: int, d_state: int = 16, dt_rank: int | str = "auto", bias: bool = False, **init: float | str
    ):
        super().__init__()
        steps = MambaInit(**init)
        self.d_state, self.dt_rank = d_state, time_step_rank(dt_rank, d_model)
        self.x_proj = nn.Linear(d_model, self.dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, d_model)
        self.D = nn.Parameter(torch.ones(d_model))
        self.out_proj = nn.Linear(d_model, d_model, bias=bias)
        steps.time_step_(self.dt_proj)
        self.make_decay(d_model)

    def make_decay(self, e: int) -> None:
        self.A_log = nn.Parameter(torch.empty(e, self.d_state))
        A_log_s4d_real_(self.A_log)

    @property
    def A(self) -> Tensor:
        """(e n) negative, fp32"""
        return -torch.exp(fp32(self.A_log))

    def step_size(self, dt: Tensor) -> Tensor:
        """(b l r) -> (b e l) before bias and softplus"""
        return F.linear(dt, self.dt_proj.weight).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        dt, B, C = self.x_proj(x).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        y = selective_scan_fn(
            x.transpose(1, 2),
            self.step_size(dt),
            self.A,
            B.transpose(1, 2),
            C.transpose(1, 2),
            fp32(self.D),
            delta_bias=fp32(self.dt_proj.bias),
            delta_softplus=True,
        )
        return self.out_proj(y.transpose(1, 2))


class ScalarS6(S6):
    """S6 with Mamba-2's decay: one trained number for all channels, one step per token plus a bias per channel.

    Id (ones, not trained) and dt_proj.weight (unused) are in the released checkpoints, so they are kept; A =
    -exp(A_log Id).
    """

    def __init__(self, d_model: int, d_state: int = 16, bias: bool = False, **init: float | str):
        super().__init__(d_model, d_state, 1, bias, **init)

    def make_decay(self, e: int) -> None:
        self.A_log = nn.Parameter(torch.zeros(1))
        self.Id = nn.Parameter(torch.ones(e, self.d_state), requires_grad=False)

    @property
    def A(self) -> Tensor:
        return -torch.exp(fp32(self.A_log * self.Id))

    def step_size(self, dt: Tensor) -> Tensor:
        return dt.transpose(1, 2).expand(-1, self.dt_proj.bias.shape[0], -1)


class QLSTM(nn.Module):
    """Quasi-LSTM: gates from the input alone, so that the recurrence is linear in its state.

        [g, x] = W u;  x = causal conv_k(x);  f, i, o = W_g x
        h_t = alpha_t h_{t-1} + sigma(i_t) x_t;   y = W_o (GELU(g) sigma(o) h)
        alpha = sigma(f), or "reversed" sigma(-f)^relu(a) with a learned a, which is S6's exp(-a softplus(f))

    expansion_factor   e / d | kernel_size   k | reversed   which alpha
    """

    def __init__(self, d_model: int, expansion_factor: int = 2, kernel_size: int = 4, reversed: bool = False):
        super().__init__()
        e = self.d_inner = int(expansion_factor * d_model)
        self.reversed, self.kernel_size = reversed, kernel_size
        self.input = nn.Linear(d_model, 2 * e, bias=False)
        self.conv = nn.Conv1d(e, e, kernel_size, groups=e, bias=True)
        self.gates = nn.Linear(e, 3 * e)
        self.alpha = nn.Parameter(torch.ones(()), requires_grad=reversed)  # in the checkpoints, used when reversed
        self.output = nn.Linear(e, d_model, bias=False)
        for linear, width in ((self.input, d_model), (self.gates, e), (self.output, e)):
            nn.init.normal_(linear.weight, std=width**-0.5)

    def forget(self, f: Tensor) -> Tensor:
        return torch.sigmoid(-f) ** F.relu(self.alpha) if self.reversed else torch.sigmoid(f)

    def forward(self, u: Tensor) -> Tensor:
        gate, x = self.input(u).chunk(2, dim=-1)
        x = causal_conv1d_fn(x.transpose(1, 2), self.conv.weight.squeeze(1), self.conv.bias).transpose(1, 2)
        f, i, o = self.gates(x).chunk(3, dim=-1)
        h = linear_recurrence(self.forget(f), torch.sigmoid(i) * x)
        return self.output(F.gelu(gate) * torch.sigmoid(o) * h)


def linear_recurrence(decay: Tensor, x: Tensor) -> Tensor:
    """h_t = decay_t h_{t-1} + x_t along dimension 1. (b l e)"""
    h, out = torch.zeros_like(x[:, 0]), []
    for a, v in zip(decay.unbind(1), x.unbind(1)):
        h = a * h + v
        out.append(h)
    return torch.stack(out, dim=1)
