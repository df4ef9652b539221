"""Gated SSM: a language model of gated linear recurrences alone; every second layer reads the prefix both ways.

    x <- x + GatedSSM(RMSNorm(x)) for every layer;   logits = W_head RMSNorm(x)

The layer, which holds what a feed-forward layer is for elsewhere, and its equations are in layers/mixers/gated_ssm.py.
Birdie's data and objectives train it (data=birdie); without a prefix it is a causal model like any other.
The paper states neither vocabulary, tying nor initialisation; ours are Mamba's. `form="released"` is the module of the
released reward model, with its norm.
Source: Blouir et al. 2024 (arXiv 2411.01030), sections 3.1 and 3.4, appendix A; samblouir/birdie.
"""

from __future__ import annotations

import functools

from torch import Tensor, nn

from ssmzoo.layers.decoder import Block, CausalLM, check_sizes, layer_pattern
from ssmzoo.layers.mixers.gated_ssm import GatedSSM, ReleasedGatedSSM, ScaledNorm
from ssmzoo.layers.norm import RMSNorm
from ssmzoo.layers.state import refuse_prefix
from ssmzoo.suggest import nearest

FORMS = ("paper", "released")


class BirdieLM(CausalLM):
    """A decoder with RMSNorms whose layers follow a pattern of B (bidirectional over the prefix) and C (causal).

    Embedding and untied head are N(0, 0.02).
    """

    def __init__(
        self, vocab_size: int, d_model: int, pattern: list[str], blocks: list[Block], norm, tie_embeddings: bool
    ):
        head = nn.Linear(d_model, vocab_size, bias=False)
        super().__init__(nn.Embedding(vocab_size, d_model), blocks, head, norm=norm(d_model))
        nn.init.normal_(self.embedding.weight, std=0.02)
        if tie_embeddings:
            self.head.weight = self.embedding.weight
        else:
            nn.init.normal_(self.head.weight, std=0.02)
        self.reads_prefixes = "B" in pattern

    def decode(self, input_ids: Tensor, state: tuple | None, **more) -> tuple[Tensor, tuple, dict[str, Tensor]]:
        if not self.reads_prefixes:
            refuse_prefix(more["prefix"], f"{type(self).__name__} without a B in its layer_pattern")
        return super().decode(input_ids, state, **more)

    token_parts = CausalLM.token_parts


class GatedSSMLM(BirdieLM):
    """ids (b l) -> ModelOutput(logits (b l v), state, {}); the defaults are the paper's 1.4B model.

    vocab_size       v
    d_model, d_state, n_layer   width, channels of the recurrence, number of layers
    layer_pattern    B reads the prefix in both directions, C is causal; a shorter pattern repeats (paper: BC)
    form             paper | released (one direction only: layer_pattern=C)
    tie_embeddings   the head's weight is the embedding's

    Raises ValueError for sizes below 1, unknown letters and forms.
    """

    def __init__(
        self,
        vocab_size: int = 50277,
        d_model: int = 2048,
        d_state: int = 2560,
        n_layer: int = 48,
        layer_pattern: str = "BC",
        form: str = "paper",
        norm_eps: float = 1e-5,
        tie_embeddings: bool = True,
    ):
        check_sizes(vocab_size=vocab_size, d_model=d_model, d_state=d_state, n_layer=n_layer)
        if form not in FORMS:
            raise ValueError(f"form is {form!r}; choose one of {', '.join(FORMS)}{nearest(str(form), FORMS)}")
        pattern = directions(layer_pattern, n_layer)
        released = form == "released"
        if released and "B" in pattern:
            raise ValueError(f"form=released reads in one direction only; got {layer_pattern=}, give layer_pattern=C")
        norm = ScaledNorm if released else functools.partial(RMSNorm, eps=norm_eps)

        def mixer(kind: str) -> nn.Module:
            return ReleasedGatedSSM(d_model, d_state) if released else GatedSSM(d_model, d_state, kind == "B")

        blocks = [Block(d_model, {"mixer": mixer(kind)}, norm=norm) for kind in pattern]
        super().__init__(vocab_size, d_model, pattern, blocks, norm, tie_embeddings)

    def no_weight_decay(self) -> list[str]:
        """The matrices of the forget gates, as published."""
        return [name for name, _ in self.named_parameters() if name.endswith("mixer.W_f.weight")]


def directions(pattern: str, n_layer: int) -> list[str]:
    """B or C for every layer."""
    return layer_pattern(pattern, n_layer, {"B": "B", "C": "C"})
