"""Cheems: rotary SSD layers and, now and then, attention with a mask that the values compute; experts of one neuron.

    x <- w1 * x + Mixer(RMSNorm(x));   x <- w2 * x + FF(RMSNorm(x));   logits = W_head RMSNorm(x), tied

w1 and w2 (d) are learned and scale the residual, not the branch. One rotary embedding serves both kinds of
mixers, whose equations are in cheems_layers/rotary_ssd.py and dynamic_mask.py. FF is a gated MLP, with `n_experts`
joined by experts of one neuron each that product keys find (cheems_layers/cross_domain.py).
Differs from the released code: A is negative by default (there +1, and the state grows), the mask's threshold looks at
the past only (there at all keys, later ones too), padding is skipped in every position.

b batch, l length, d width, v vocabulary.
Source: Wonderful Matrices (arXiv 2407.16958, 2412.11834); LoserCheems/WonderfulMatrices (Apache-2.0).
"""

from __future__ import annotations

import functools

from torch import Tensor, nn

from ssmzoo.layers.decoder import Block, CausalLM
from ssmzoo.layers.decoder import layer_pattern as letters
from ssmzoo.layers.norm import RMSNorm
from ssmzoo.layers.plain import is_plain
from ssmzoo.layers.program import Builder
from ssmzoo.models.cheems_layers.cross_domain import CrossDomainExperts, SwiGLU
from ssmzoo.models.cheems_layers.dynamic_mask import DynamicMaskAttention
from ssmzoo.models.cheems_layers.rotary_ssd import RotarySSD
from ssmzoo.ops.token_step import Register


class ResidualScale(nn.Module):
    """weight * x, x (... d)"""

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim
        self.weight = nn.Parameter(Tensor(dim).fill_(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x


class CheemsBlock(Block):
    """A mixer, `ssd` or `attn`, and a feed-forward, under the names of the released checkpoints."""

    def __init__(self, kind: str, mixer: nn.Module, feed_forward: nn.Module, d_model: int, dropout: float):
        nn.Module.__init__(self)
        self.kind = kind
        self.pre_sequence_layernorm = RMSNorm(d_model, eps=1e-6)
        self.add_module(kind, mixer)
        self.post_sequence_residual = ResidualScale(d_model)
        self.pre_state_layernorm = RMSNorm(d_model, eps=1e-6)
        self.feed_forward = feed_forward
        self.post_state_residual = ResidualScale(d_model)
        self.dropout = nn.Dropout(dropout)
        self.set_kinds({kind: mixer, "feed_forward": feed_forward})
        self.parallel = False

    def sublayers(self):
        mixer = (self.kind, self.pre_sequence_layernorm, getattr(self, self.kind))
        return [mixer, ("feed_forward", self.pre_state_layernorm, self.feed_forward)]

    def residual(self, name: str, x: Tensor, u: Tensor, y: Tensor) -> Tensor:
        scale = self.post_state_residual if name == "feed_forward" else self.post_sequence_residual
        return scale(x) + self.dropout(y)

    program = Block.program

    def add(self, p: Builder, name: str, x: Register, u: Register, y: Register) -> None:
        scale = self.post_state_residual if name == "feed_forward" else self.post_sequence_residual
        p.need(is_plain(scale, among=frozenset({ResidualScale})), is_plain(self.dropout, among=frozenset({nn.Dropout})))
        p.mix(y, c=x, out=x, weights=(scale.weight, None))


class CheemsLM(CausalLM):
    """ids (b l) -> ModelOutput(logits (b l v), state, {}); the defaults are those of the released configuration.

    vocab_size, d_model, n_layer   v, d and number of layers
    layer_pattern     one letter per layer, S for rotary SSD and A for attention; a shorter pattern repeats
    n_heads, n_kv_heads   of both mixers; key and value heads of the attention (default n_heads)
    d_ff              hidden width of the gated MLP
    a_mode            neg_exp | raw, the sign of the SSD's A (ssmzoo.models.cheems_layers.rotary_ssd)
    mask_ratio, mask_over     share of the keys that attention hides, and among which keys: past | all
    n_experts         one-neuron experts per layer, a square number; 0: the MLP alone
    expert_heads, experts_per_head, d_retrieval   of the product keys that find them
    bias              of all projections | dropout: on every branch, while training
    """

    blocks_name, norm_name = "layers", "final_layernorm"

    def __init__(
        self,
        vocab_size: int = 32768,
        d_model: int = 1024,
        n_layer: int = 32,
        n_heads: int = 8,
        d_ff: int = 2048,
        layer_pattern: str = "SSSSSSSA",
        n_kv_heads: int | None = None,
        a_mode: str = "neg_exp",
        mask_ratio: float = 0.0,
        mask_over: str = "past",
        n_experts: int = 0,
        expert_heads: int = 4,
        experts_per_head: int = 8,
        d_retrieval: int = 64,
        rope_base: float = 10000.0,
        bias: bool = False,
        dropout: float = 0.0,
        tie_embeddings: bool = True,
    ):
        if min(vocab_size, d_model, n_layer) < 1 or n_experts < 0:
            raise ValueError(
                f"need vocab_size, d_model and n_layer >= 1 and n_experts >= 0 (0: none), got {vocab_size=}, "
                f"{d_model=}, {n_layer=}, {n_experts=}"
            )
        rope = dict(rope_base=rope_base, bias=bias)
        attention = dict(n_kv_heads=n_kv_heads, mask_ratio=mask_ratio, mask_over=mask_over)
        mixers = {
            "S": ("ssd", functools.partial(RotarySSD, d_model, n_heads, a_mode, **rope)),
            "A": ("attn", functools.partial(DynamicMaskAttention, d_model, n_heads, **attention, **rope)),
        }
        experts = (n_experts, expert_heads, experts_per_head, d_retrieval)

        def feed_forward() -> nn.Module:
            return CrossDomainExperts(d_model, d_ff, *experts, bias) if n_experts else SwiGLU(d_model, d_ff, bias)

        layers = letters(layer_pattern, n_layer, mixers)
        blocks = [CheemsBlock(kind, make(), feed_forward(), d_model, dropout) for kind, make in layers]
        head = nn.Linear(d_model, vocab_size, bias=False)
        super().__init__(nn.Embedding(vocab_size, d_model), blocks, head, norm=RMSNorm(d_model, eps=1e-6))
        if tie_embeddings:
            self.head.weight = self.embedding.weight
        looks_ahead = mask_ratio > 0 and mask_over == "all" and any(hasattr(block, "attn") for block in blocks)
        self.causal = not looks_ahead
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Projections and embeddings N(0, 0.02), biases 0; the product keys, A, norms and residual scales their own."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)
