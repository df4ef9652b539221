"""Hydra: parallel branches of an SSM, windowed attention and chunk-routed experts, and two memories behind every block.

    x <- LN( x + g1 SSM(x) + g2 Attention(x) + g3 Experts(x) )        all branches read the same x
    x <- Workspace(x);   x <- Facts(x)                                one instance of each serves all blocks
    logits = W_head LN(x), tied

Every `attn_every`-th block has attention, every second one, from the first, experts. The equations are in
hydra_layers/hydra_ssm.py, chunk_experts.py and memory.py. A proposal with a prototype: there are no
trained weights, and the sizes of the 1.6B target were not published.
Differs from the prototype by default: chunks are routed by the chunk before them, the weights of the experts keep their
axes, the workspace is causal and belongs to a sequence, the embedding starts small. Its global top-k attention was
never used and is left out.

b batch, l length, d width, v vocabulary.
Source: arXiv 2508.15099; sidcraftscode/Hydra, toy_hydra.py, for names and sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ssmzoo.layers.decoder import Block, CausalLM
from ssmzoo.layers.mixers.sliding_attention import SlidingAttention
from ssmzoo.layers.plain import is_plain
from ssmzoo.layers.program import Builder
from ssmzoo.layers.state import Padding
from ssmzoo.models.hydra_layers.chunk_experts import ChunkExperts
from ssmzoo.models.hydra_layers.hydra_ssm import ElementwiseSSM, GatedConv
from ssmzoo.models.hydra_layers.memory import ProductKeyMemory, PublishedWorkspace, Workspace
from ssmzoo.ops.token_step import Register
from ssmzoo.suggest import from_slot, nearest

SSMS = {"conv": GatedConv, "recurrent": ElementwiseSSM}
WORKSPACES = {"causal": Workspace, "published": PublishedWorkspace}


class NormedAttention(SlidingAttention):
    """Attention to a window behind a LayerNorm of its own, without positions."""

    def __init__(self, d_model: int, n_heads: int, window: int):
        super().__init__(d_model, n_heads, window + 1, rope=False)  # window keys before the token itself
        self.ln = nn.LayerNorm(d_model)

    def forward(self, x: Tensor, state=None, *, mask: Tensor | Padding | None = None, seq_idx: Tensor | None = None):
        return super().forward(self.ln(x), state, mask=mask, seq_idx=seq_idx)

    def program(self, p: Builder, x: Register) -> Register:
        return super().program(p, p.norm(self.ln, x))


class HydraBlock(Block):
    """The branches, by name, and the memories, which the model owns."""

    def __init__(self, d_model: int, ssm: nn.Module, attn: nn.Module | None, moe: nn.Module | None, memories: tuple):
        nn.Module.__init__(self)
        self.ssm, self.attn, self.moe = ssm, attn, moe
        self.g1 = nn.Parameter(torch.tensor(1.0))
        self.g2 = nn.Parameter(torch.tensor(0.15 if attn else 0.0))
        self.g3 = nn.Parameter(torch.tensor(0.5 if moe else 0.0))
        self.same, self.res_ln = nn.Identity(), nn.LayerNorm(d_model)
        self.memories = memories  # in a tuple, so that their weights are the model's and no block's
        self.set_kinds({name: m for name, m in (("ssm", ssm), ("attn", attn), ("moe", moe)) if m is not None})

    def sublayers(self):
        return [(name, self.same if name == "ssm" else None, getattr(self, name)) for name in self.takes]

    def residual(self, name: str, x: Tensor, u: Tensor, y: Tensor) -> Tensor:
        return x + {"ssm": self.g1, "attn": self.g2, "moe": self.g3}[name] * y

    def program(self, p: Builder, x: Register) -> None:
        u, mark = p.mix(x), p.free
        for name, _, layer in self.sublayers():
            p.need(name != "ssm" or is_plain(self.same, among=frozenset({nn.Identity})))
            y = p.use(layer).program(p, u)
            p.mix(y, c=x, out=x, weights=(None, {"ssm": self.g1, "attn": self.g2, "moe": self.g3}[name]))
            p.free = mark
        p.norm(self.res_ln, x)
        p.code[-1] = p.code[-1]._replace(out=x)
        for memory in self.memories:
            if memory is not None:
                p.roots.append(memory)
                p.use(memory).program(p, x)
        p.free = x.size

    def forward(
        self,
        x: Tensor,
        state: Any = None,
        *,
        mask: Padding | None = None,
        seq_idx: Tensor | None = None,
        prefix: Tensor | None = None,
    ):
        branches, slots = (None, None) if state is None else state
        x, branches, aux = super().forward(x, branches, mask=mask, seq_idx=seq_idx, prefix=prefix)
        x, (workspace, facts) = self.res_ln(x), self.memories
        if workspace is not None:
            x, slots = workspace(x, slots, mask=mask, seq_idx=seq_idx)
        return (x if facts is None else facts(x)), (branches, slots), aux


class HydraLM(CausalLM):
    """ids (b l) -> ModelOutput(logits (b l v), state, aux); the defaults are the prototype's, 5.77M parameters.

    vocab_size, d_model, n_layer   v, d and number of blocks
    ssm              conv | recurrent
    attn_every, n_heads, window    which blocks have attention (0: none), its heads, and keys seen before the token
    n_experts, d_expert, chunk_size, gate_temperature, balance_weight   of the experts; n_experts 0: none
    routing, legacy_chunk_reshape  previous_chunk | chunk (published, looks ahead) (ChunkExperts)
    pkm              arguments of ssmzoo.models.hydra_layers.memory.ProductKeyMemory; None: no such memory
    workspace        None | causal | published (looks ahead), with n_slots slots
    embedding_std    of the embedding, which is the head, at first; the prototype has 1, and begins far above guessing
    """

    norm_name = "ln_f"

    def __init__(
        self,
        vocab_size: int = 4000,
        d_model: int = 256,
        n_layer: int = 8,
        ssm: str = "conv",
        attn_every: int = 4,
        n_heads: int = 4,
        window: int = 256,
        n_experts: int = 4,
        d_expert: int = 256,
        chunk_size: int = 32,
        gate_temperature: float = 1.0,
        balance_weight: float = 0.01,
        routing: str = "previous_chunk",
        legacy_chunk_reshape: bool = False,
        pkm: Mapping[str, Any] | None = None,
        workspace: str | None = None,
        n_slots: int = 64,
        embedding_std: float = 0.02,
    ):
        if min(vocab_size, d_model, n_layer, window) < 1 or min(attn_every, n_experts) < 0 or embedding_std <= 0:
            raise ValueError(
                f"need vocab_size, d_model, n_layer and window >= 1, attn_every and n_experts >= 0 (0: none) and "
                f"embedding_std > 0, got {vocab_size=}, {d_model=}, {n_layer=}, {window=}, {attn_every=}, "
                f"{n_experts=}, {embedding_std=}"
            )
        for name, value, known in (("ssm", ssm, SSMS), ("workspace", workspace, WORKSPACES)):
            if value not in known and not (name == "workspace" and value is None):
                raise ValueError(f"{name} is {value!r}{nearest(str(value), known)}; choose one of {', '.join(known)}")
        options = (chunk_size, 2, gate_temperature, balance_weight, routing, legacy_chunk_reshape)
        slots = WORKSPACES[workspace](d_model, n_slots, chunk_size, n_uses=n_layer) if workspace else None
        facts = None if pkm is None else from_slot("pkm", pkm, ProductKeyMemory, d_model)

        def block(i: int) -> HydraBlock:
            attention = attn_every and (i + 1) % attn_every == 0
            experts = n_experts and i % 2 == 0
            attn = NormedAttention(d_model, n_heads, window) if attention else None
            moe = ChunkExperts(d_model, n_experts, d_expert, *options) if experts else None
            return HydraBlock(d_model, SSMS[ssm](d_model), attn, moe, (slots, facts))

        embedding, head = nn.Embedding(vocab_size, d_model), nn.Linear(d_model, vocab_size, bias=False)
        super().__init__(embedding, [block(i) for i in range(n_layer)], head, norm=nn.LayerNorm(d_model))
        self.head.weight = self.embedding.weight
        nn.init.normal_(self.embedding.weight, std=embedding_std)
        self.workspace, self.pkm = slots, facts
        self.causal = workspace != "published" and not (n_experts and routing == "chunk")
