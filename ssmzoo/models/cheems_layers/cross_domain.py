"""Feed-forward of Cheems: a dense gated MLP that all domains share, and a few of very many one-neuron experts.

    dense    W_down (SiLU(W_gate x) * W_up x)
    private  sum over heads and their k experts e of  SiLU(<x, down_e>) softmax_k(s)_e up_e,  s by product keys

b batch, l length, d width, h expert heads, k experts per head, e experts.
Source: arXiv 2412.11834; LoserCheems/WonderfulMatrices (Apache-2.0) for names and layouts. Its keys start at zero, so
that the first routing depends on the order of ties.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssmzoo.layers.feedforward.product_key import ProductKeys, square_root
from ssmzoo.layers.plain import is_plain
from ssmzoo.layers.program import Builder
from ssmzoo.ops import dot_rows, sum_rows
from ssmzoo.ops.token_step import Register


class SwiGLU(nn.Module):
    """W_down (SiLU(W_gate x) * W_up x), x (... d) -> (... d)."""

    def __init__(self, d_model: int, d_ff: int, bias: bool = False):
        super().__init__()
        if min(d_model, d_ff) < 1:
            raise ValueError(f"SwiGLU needs positive sizes, got d_model={d_model}, d_ff={d_ff}")
        self.gate_proj = nn.Linear(d_model, d_ff, bias=bias)
        self.up_proj = nn.Linear(d_model, d_ff, bias=bias)
        self.down_proj = nn.Linear(d_ff, d_model, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))

    def program(self, p: Builder, x: Register) -> Register:
        return p.linear(self.down_proj, p.mix(p.linear(self.gate_proj, x), p.linear(self.up_proj, x), act="silu"))


class CrossDomainExperts(SwiGLU):
    """The dense MLP plus retrieved one-neuron experts, x (b l d) -> (b l d).

    n_experts       e, a square number | n_heads, experts_per_head: h and k
    d_retrieval     width of a query, even; half of it is compared with each half key
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        n_experts: int,
        n_heads: int = 4,
        experts_per_head: int = 8,
        d_retrieval: int = 64,
        bias: bool = False,
    ):
        super().__init__(d_model, d_ff, bias)
        n = square_root(n_experts, "n_experts")
        if d_retrieval < 2 or d_retrieval % 2:
            raise ValueError(f"d_retrieval = {d_retrieval} must be even: queries are compared in two halves")
        self.split = (2, n_heads, d_retrieval // 2)
        self.queries = nn.Linear(d_model, n_heads * d_retrieval, bias=False)
        self.keys = ProductKeys(n, n, d_retrieval // 2, experts_per_head, n_heads, init_std=0.0)
        self.down_embed = nn.Embedding(n_experts, d_model)
        self.up_embed = nn.Embedding(n_experts, d_model)

    def forward(self, x: Tensor) -> Tensor:
        queries = self.queries(x).unflatten(-1, self.split).transpose(-3, -2)  # (b l h 2 r)
        scores, expert = self.keys(queries)  # (b l h k)
        expert, share = expert.flatten(-2), scores.softmax(-1).flatten(-2)  # (b l hk)
        if is_plain(self.down_embed, self.up_embed):
            weight = F.silu(dot_rows(self.down_embed.weight, expert, x)) * share
            return super().forward(x) + sum_rows(self.up_embed.weight, expert, weight)
        down, up = self.down_embed(expert), self.up_embed(expert)  # (b l hk d)
        weight = F.silu(torch.einsum("bld,bled->ble", x, down)) * share
        return super().forward(x) + torch.einsum("ble,bled->bld", weight, up)

    def program(self, p: Builder, x: Register) -> Register:
        queries, down, up = p.linear(self.queries, x), self.down_embed, self.up_embed  # (2 h r)
        p.need(is_plain(down, up))
        y = SwiGLU.program(self, p, x)
        return p.product_keys(self.keys, queries, y, x, (down.weight, up.weight))

    def inactive_parameters(self) -> int:
        """Parameters of the one-neuron experts that a token does not use."""
        rows, d = self.down_embed.weight.shape
        return 2 * d * max(0, rows - self.split[1] * self.keys.top_k)
