"""Gated DeltaNet and Kimi delta attention: language models whose state forgets and overwrites.

    x <- x + Mixer(RMSNorm(x));   x <- x + SwiGLU(RMSNorm(x))   for every layer;   logits = W_head RMSNorm(x)

The mixers and their equations are in layers/mixers/gated_delta.py, the recurrence in ops/gated_delta_rule. A layer
pattern puts attention without positions between them, as Kimi Linear does after every third layer ("DDDA").
With allow_neg_eigval the state can flip its sign, so that parity and other automata are within reach.
Differs from the sources: one convolution and one input projection hold what are several there.
Source: Yang et al. 2024 (arXiv 2412.06464), Kimi Linear (arXiv 2510.26692), Grazzi et al. 2024 (arXiv 2411.12537);
fla-org/flash-linear-attention models/{gated_deltanet,kda} for the defaults.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from torch import nn

from ssmzoo.layers.decoder import Block, CausalLM, layer_pattern, padded_vocab_size
from ssmzoo.layers.feedforward.mlp import GatedMLP
from ssmzoo.layers.init import causal_lm_
from ssmzoo.layers.mixers.attention import MHA
from ssmzoo.layers.mixers.gated_delta import GatedDeltaNet, KimiDeltaAttention
from ssmzoo.layers.norm import RMSNorm
from ssmzoo.suggest import from_slot


class GatedDeltaNetLM(CausalLM):
    """ids (b l) -> ModelOutput(logits (b l v), state, {}); the defaults are the 1.3B model of fla.

    vocab_size, pad_vocab_size_multiple   v is vocab_size rounded up to a multiple
    d_model, n_layer       width and number of layers
    num_heads, head_dim, expand_v, num_v_heads, conv_size, allow_neg_eigval   of the mixer
                           (ssmzoo.layers.mixers.gated_delta)
    d_ff                   width of the SwiGLU, rounded up to 128; default 8/3 d_model, 0: none
    layer_pattern, attn_cfg   letters D (the delta rule) and A (attention), repeated, and the attention's arguments
                           (ssmzoo.layers.mixers.attention.MHA)
    tie_embeddings         the head's weight is the embedding's
    """

    mixer = GatedDeltaNet

    def __init__(
        self,
        vocab_size: int = 32000,
        d_model: int = 2048,
        n_layer: int = 21,
        num_heads: int = 6,
        head_dim: int = 256,
        expand_v: float = 2.0,
        num_v_heads: int | None = None,
        conv_size: int = 4,
        allow_neg_eigval: bool = False,
        d_ff: int | None = None,
        layer_pattern: str = "D",
        attn_cfg: Mapping[str, Any] | None = None,
        norm_eps: float = 1e-5,
        tie_embeddings: bool = False,
        pad_vocab_size_multiple: int = 8,
    ):
        if d_model < 1 or n_layer < 1 or (d_ff or 0) < 0:
            raise ValueError(f"need d_model and n_layer >= 1 and d_ff >= 0, got {d_model=}, {n_layer=}, {d_ff=}")
        d_ff = 8 * d_model // 3 if d_ff is None else d_ff
        norm = functools.partial(RMSNorm, eps=norm_eps)
        delta = dict(num_heads=num_heads, head_dim=head_dim, expand_v=expand_v, num_v_heads=num_v_heads)
        delta |= dict(conv_size=conv_size, allow_neg_eigval=allow_neg_eigval, norm_eps=norm_eps)
        kinds = layer_letters(layer_pattern, n_layer, attn_cfg)

        def block(kind: str) -> Block:
            mixer = from_slot("attn_cfg", attn_cfg, MHA, d_model) if kind == "A" else self.mixer(d_model, **delta)
            return Block(d_model, {"mixer": mixer} | ({"mlp": GatedMLP(d_model, d_ff)} if d_ff else {}), norm=norm)

        rows = padded_vocab_size(vocab_size, pad_vocab_size_multiple)
        head = nn.Linear(d_model, rows, bias=False)
        super().__init__(nn.Embedding(rows, d_model), map(block, kinds), head, norm=norm(d_model))
        if tie_embeddings:
            self.head.weight = self.embedding.weight
        self.vocab_size = vocab_size
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """See `causal_lm_`."""
        causal_lm_(self)


class KimiDeltaLM(GatedDeltaNetLM):
    """The same with a decay for every channel of the keys, and the defaults of fla's KDA."""

    mixer = KimiDeltaAttention

    def __init__(
        self,
        vocab_size: int = 32000,
        d_model: int = 2048,
        n_layer: int = 24,
        num_heads: int = 16,
        head_dim: int = 128,
        expand_v: float = 1.0,
        conv_size: int = 4,
        allow_neg_eigval: bool = False,
        d_ff: int | None = None,
        layer_pattern: str = "D",
        attn_cfg: Mapping[str, Any] | None = None,
        norm_eps: float = 1e-5,
        tie_embeddings: bool = False,
        pad_vocab_size_multiple: int = 8,
    ):
        super().__init__(
            vocab_size,
            d_model,
            n_layer,
            num_heads,
            head_dim,
            expand_v,
            None,
            conv_size,
            allow_neg_eigval,
            d_ff,
            layer_pattern,
            attn_cfg,
            norm_eps,
            tie_embeddings,
            pad_vocab_size_multiple,
        )


def layer_letters(pattern: str, n_layer: int, attn_cfg: Mapping[str, Any] | None) -> list[str]:
    """D or A for every layer. Raises ValueError for other letters, and for A or attn_cfg without the other."""
    kinds = layer_pattern(pattern, n_layer, {"D": "D", "A": "A"})
    if ("A" in kinds) != bool(attn_cfg):
        raise ValueError(
            f"attn_cfg={attn_cfg} with layers {''.join(kinds)}: give attn_cfg (at least num_heads) if, and only if, "
            "layer_pattern has an A"
        )
    return kinds
