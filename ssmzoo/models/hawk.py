"""Hawk: real-gated linear recurrences and gated MLPs, half of whose layers read the prefix in both directions (Birdie).

    x <- x + HawkMixer(RMSNorm(x));   x <- x + MLP(RMSNorm(x));   logits = W_head RMSNorm(x)

The recurrence and its equations are in layers/mixers/rg_lru.py; the MLP is W_2 (v * GeLU(g)), [v, g] = W_1 x, 8/3 as
wide as the model. Birdie's Hawk differs from Griffin's in its dense gates and in the bidirectional layers. The paper
states neither vocabulary, tying nor initialisation; ours are Griffin's for the recurrence and Mamba's for the rest.
Source: De et al. 2024 (arXiv 2402.19427); Blouir et al. 2024 (arXiv 2411.01030).
"""

from __future__ import annotations

import functools

from ssmzoo.layers.decoder import Block
from ssmzoo.layers.feedforward.mlp import GatedMLP
from ssmzoo.layers.mixers.rg_lru import HawkMixer
from ssmzoo.layers.norm import RMSNorm
from ssmzoo.models.gated_ssm import BirdieLM, check_sizes, directions


class HawkLM(BirdieLM):
    """ids (b l) -> ModelOutput(logits (b l v), state, {}); the defaults are Birdie's 1.4B model.

    vocab_size       v
    d_model, d_state, n_layer   width, channels of the recurrence, number of blocks
    d_ff             width of the MLP; None: 8/3 d_model
    d_conv           taps of the convolution before the recurrence
    layer_pattern    B reads the prefix in both directions, C is causal; a shorter pattern repeats (Birdie: BC)
    conv_across_documents   published behaviour with packed documents, where the convolution sees the one before
    tie_embeddings   the head's weight is the embedding's

    Raises ValueError for sizes below 1 and unknown letters.
    """

    def __init__(
        self,
        vocab_size: int = 50277,
        d_model: int = 2048,
        d_state: int = 2560,
        n_layer: int = 20,
        d_ff: int | None = None,
        d_conv: int = 4,
        layer_pattern: str = "BC",
        norm_eps: float = 1e-5,
        conv_across_documents: bool = False,
        tie_embeddings: bool = True,
    ):
        d_ff = 8 * d_model // 3 if d_ff is None else d_ff
        check_sizes(vocab_size=vocab_size, d_model=d_model, d_state=d_state, n_layer=n_layer, d_ff=d_ff, d_conv=d_conv)
        pattern = directions(layer_pattern, n_layer)
        norm = functools.partial(RMSNorm, eps=norm_eps)

        def block(kind: str) -> Block:
            mixer = HawkMixer(d_model, d_state, d_conv, kind == "B", conv_across_documents)
            return Block(d_model, {"mixer": mixer, "mlp": GatedMLP(d_model, d_ff, "gelu", multiple_of=8)}, norm=norm)

        super().__init__(vocab_size, d_model, pattern, [block(kind) for kind in pattern], norm, tie_embeddings)

    def no_weight_decay(self) -> list[str]:
        """The parameters of the RG-LRUs, as published."""
        return [name for name, _ in self.named_parameters() if ".rg_lru." in name]
