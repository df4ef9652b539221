"""Experts chosen for whole chunks of tokens.

    m = mean of LN(x) over a chunk;   logits = W_g m / temperature;   y_t = sum over the 2 best e of  p_e FF_e(LN(x_t))

with p the softmax over the chosen logits and FF_e gated (SwiGLU). `routing`: "previous_chunk" takes m from the chunk
before (the first chunk of a document has logits 0), so that nothing looks ahead; "chunk", as published, from the
token's own chunk, later tokens included, divided by the full size also where the sequence ends within it.
`legacy_chunk_reshape` repeats the published dense evaluation, which gives weights (b chunks e c) the shape (b e l)
without moving the axis of the experts: with more than one chunk they reach other experts and positions.

b batch, l length, d width, e experts, c tokens of a chunk.
Source: arXiv 2508.15099; sidcraftscode/Hydra, toy_hydra.py.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ssmzoo.layers.feedforward.moe import Experts
from ssmzoo.layers.feedforward.router import TokenChoice
from ssmzoo.layers.program import Builder
from ssmzoo.layers.state import Padding, call_aligned, itemsize
from ssmzoo.models.hydra_layers.chunks import ChunkState, chunks, of_chunk
from ssmzoo.ops.moe_dispatch import gather_rows, group_by_expert, scatter_rows
from ssmzoo.ops.token_step import Register
from ssmzoo.suggest import nearest

ROUTINGS = ("previous_chunk", "chunk")


class ChunkExperts(nn.Module):
    """Layer with state, forward(x (b l d), state) -> (y (b l d), state, [aux]).

    n_experts, d_expert, top_k, balance_weight   of the experts and their router (TokenChoice)
    chunk_size     c | temperature: of the logits
    routing, legacy_chunk_reshape   see above
    """

    def __init__(
        self,
        d_model: int,
        n_experts: int = 4,
        d_expert: int = 256,
        chunk_size: int = 32,
        top_k: int = 2,
        temperature: float = 1.0,
        balance_weight: float = 0.01,
        routing: str = "previous_chunk",
        legacy_chunk_reshape: bool = False,
    ):
        super().__init__()
        if chunk_size < 1 or temperature <= 0:
            raise ValueError(f"need chunk_size >= 1 token and temperature > 0, got {chunk_size=}, {temperature=}")
        if routing not in ROUTINGS:
            known = ", ".join(ROUTINGS)
            raise ValueError(f"routing is {routing!r}{nearest(str(routing), ROUTINGS)}; choose one of {known}")
        if legacy_chunk_reshape and routing != "chunk":
            raise ValueError(f"legacy_chunk_reshape belongs to routing='chunk', as published; routing is {routing!r}")
        self.chunk_size, self.temperature, self.routing, self.legacy = (
            chunk_size,
            temperature,
            routing,
            legacy_chunk_reshape,
        )
        self.ln = nn.LayerNorm(d_model)
        self.gating = TokenChoice(d_model, n_experts, top_k, renormalise=True, balance_weight=balance_weight)
        self.experts = Experts(d_model, n_experts, d_expert, "swiglu")

    def forward(
        self,
        x: Tensor,
        state: ChunkState | None = None,
        *,
        mask: Tensor | Padding | None = None,
        seq_idx: Tensor | None = None,
    ):
        if isinstance(mask, Tensor):
            return call_aligned(self.forward, x, state, mask, seq_idx)
        if state is not None and self.routing == "chunk":
            raise ValueError(
                "routing='chunk' reads the whole chunk before its first token is routed, so it cannot continue from a "
                "state; use routing=previous_chunk for a model that generates"
            )
        x = self.ln(x)
        cut = chunks(x, self.chunk_size, state, mask, seq_idx)
        logits = self.gating.logits(cut.sums / self.chunk_size) / self.temperature  # (b s e)
        if self.legacy:
            groups, weight, aux = self.published(logits[:, 2:], x.shape[1], mask, seq_idx)
        else:
            ahead = self.routing == "chunk"
            logits = of_chunk(logits, cut.number if ahead else cut.number - 1)  # (b l e)
            logits = logits if ahead else logits.masked_fill(cut.first[..., None], 0)
            groups, weight, aux = self.gating.choose(
                logits.flatten(0, 1), None if mask is None else mask.mask.flatten()
            )
        rows = self.experts(gather_rows(x.flatten(0, 1), groups), groups.ends)
        y = scatter_rows(rows, weight, groups, x.shape[0] * x.shape[1]).unflatten(0, x.shape[:2])
        return y.to(x.dtype), cut.state, [aux]

    def published(self, logits: Tensor, l: int, mask: Padding | None, seq_idx: Tensor | None):
        """All experts for all tokens, by the weights (b chunks e) of the chunks in the published order."""
        if mask is not None or seq_idx is not None:
            raise ValueError(
                "legacy_chunk_reshape knows neither padding nor packed documents; set it to False for them"
            )
        n, c = -(-l // self.chunk_size), self.chunk_size
        logits = logits[:, :n]
        p, expert = logits.softmax(-1).topk(self.gating.top_k)
        weight = torch.zeros_like(logits).scatter(-1, expert, p / p.sum(-1, keepdim=True))  # (b n e)
        b, _, e = weight.shape
        weight = weight[..., None].expand(b, n, e, c).reshape(b, e, n * c)[..., :l].transpose(1, 2)  # (b l e)
        _, _, aux = self.gating.choose(logits.flatten(0, 1), None)
        groups = group_by_expert(torch.arange(e, device=logits.device).expand(b * l, e), e)
        return groups, weight.flatten()[groups.choice], aux

    def program(self, p: Builder, x: Register) -> Register:
        p.need(self.routing == "previous_chunk")
        x = p.norm(self.ln, x)
        sums, flags = p.chunk(x, self.chunk_size)
        mean = p.mix(sums, factors=(1 / self.chunk_size, 1.0))
        return p.experts(self.gating, self.experts, x, mean, scale=1 / self.temperature, flags=flags)

    def state_bytes(self, length: int) -> int:
        return 2 * self.ln.weight.numel() * itemsize(self)[0] + 8

    def inactive_parameters(self) -> int:
        """Parameters of the experts that a token does not use."""
        total = sum(p.numel() for p in self.experts.parameters())
        return round(total * (1 - self.gating.top_k / self.gating.n_experts))
