"""Striped hybrids: a pattern of mixers, most of them recurrent, with a feed-forward layer or experts behind each.

    x <- x + Mixer_i(RMSNorm(x));   x <- x + FF_i(RMSNorm(x));   logits = W_head RMSNorm(x)

    M  Mamba                   S  Mamba-2               D  Gated DeltaNet
    K  Kimi delta attention    L  lightning attention   A  attention

"MMMAMMMM" is Jamba's stripe: one attention layer in eight, without positions, since the recurrences know where they
are; every second feed-forward is a mixture of experts there. With lightning attention seven to one and `alpha`, the
residual

    n = RMSNorm(x);   x <- alpha n + f(n)

is MiniMax-01's, whose alpha is (2 L)^(1/4) for L layers; its attention rotates half of each head.
Source: Jamba (arXiv 2403.19887), MiniMax-01 (arXiv 2501.08313), Waleffe et al. 2024 (arXiv 2406.07887) for Mamba-2.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ssmzoo.layers.decoder import Block, CausalLM, layer_pattern, padded_vocab_size
from ssmzoo.layers.feedforward.mlp import GatedMLP
from ssmzoo.layers.feedforward.moe import build_moe
from ssmzoo.layers.init import causal_lm_
from ssmzoo.layers.mixers.attention import MHA
from ssmzoo.layers.mixers.gated_delta import GatedDeltaNet, KimiDeltaAttention
from ssmzoo.layers.mixers.mamba import Mamba
from ssmzoo.layers.mixers.mamba2 import Mamba2
from ssmzoo.layers.norm import RMSNorm
from ssmzoo.layers.program import Builder
from ssmzoo.models.lightning import LightningAttention
from ssmzoo.ops.token_step import Register
from ssmzoo.suggest import from_slot

MIXERS = {
    "M": Mamba,
    "S": Mamba2,
    "D": GatedDeltaNet,
    "K": KimiDeltaAttention,
    "L": LightningAttention,
    "A": MHA,
}


class ScaledBlock(Block):
    """A block whose residual starts behind the norm: x <- alpha norm(x) + f(norm(x))."""

    alpha: float

    def residual(self, name: str, x: Tensor, u: Tensor, y: Tensor) -> Tensor:
        return self.alpha * u + y

    program = Block.program

    def add(self, p: Builder, name: str, x: Register, u: Register, y: Register) -> None:
        p.mix(y, c=u, out=x, factors=(1.0, self.alpha))


class HybridLM(CausalLM):
    """ids (b l) -> ModelOutput(logits (b l v), state, losses and metrics of the experts).

    vocab_size, pad_vocab_size_multiple   v is vocab_size rounded up to a multiple
    d_model, n_layer   width and number of layers
    layer_pattern      one letter per layer, as above; a shorter pattern repeats
    head_dim           width of the heads of S, D, K, L and A
    mixers             arguments of the mixers by letter, e.g. {"S": {"d_state": 64}, "A": {"num_heads_kv": 2}}
    d_ff               width of the SwiGLU behind every mixer, or of each expert; 0: none
    n_experts, top_k, moe_every, balance_weight   experts in every moe_every-th layer (0: none), how many a token takes,
                       and the weight of the loss that balances them
    alpha              None, or the factor of MiniMax's residual
    parameters         number of parameters wanted: chooses d_ff, so that patterns are compared at equal size
    tie_embeddings     the head's weight is the embedding's
    """

    def __init__(
        self,
        vocab_size: int = 65536,
        d_model: int = 4096,
        n_layer: int = 32,
        layer_pattern: str = "MMMAMMMM",
        head_dim: int = 128,
        mixers: Mapping[str, Mapping[str, Any]] | None = None,
        d_ff: int = 14336,
        n_experts: int = 0,
        top_k: int = 2,
        moe_every: int = 2,
        balance_weight: float = 0.001,
        alpha: float | None = None,
        parameters: int | None = None,
        norm_eps: float = 1e-6,
        tie_embeddings: bool = False,
        pad_vocab_size_multiple: int = 8,
    ):
        if min(d_model, n_layer, head_dim, moe_every) < 1 or min(d_ff, n_experts) < 0:
            raise ValueError(
                f"need d_model, n_layer, head_dim and moe_every >= 1, d_ff and n_experts >= 0; got {d_model=}, "
                f"{n_layer=}, {head_dim=}, {moe_every=}, {d_ff=}, {n_experts=}"
            )
        if n_experts and not 1 <= top_k <= n_experts:
            raise ValueError(f"top_k = {top_k} experts per token, but there are n_experts = {n_experts}")
        norm = functools.partial(RMSNorm, eps=norm_eps)
        rows = padded_vocab_size(vocab_size, pad_vocab_size_multiple)
        mixing = make_mixers(layer_pattern, n_layer, d_model, head_dim, mixers or {})
        with_experts = [bool(n_experts) and (i + 1) % moe_every == 0 for i in range(n_layer)]
        if parameters is not None:
            fixed = rows * d_model * (1 if tie_embeddings else 2) + (2 * n_layer + 1) * d_model
            fixed += sum(p.numel() for mixer in mixing for p in mixer.parameters())
            fixed += sum(with_experts) * d_model * n_experts  # routers
            d_ff = width_for(parameters, fixed, 3 * d_model * sum(n_experts if e else 1 for e in with_experts))

        def feedforward(experts: bool) -> nn.Module:
            if not experts:
                return GatedMLP(d_model, d_ff, multiple_of=1)
            more = dict(top_k=top_k, balance_weight=balance_weight, renormalise=True)
            return build_moe(d_model, n_experts, d_ff, expert="swiglu", **more)

        def block(mixer: nn.Module, experts: bool) -> Block:
            layers = {"mixer": mixer} | ({"ff": feedforward(experts)} if d_ff else {})
            if alpha is None:
                return Block(d_model, layers, norm=norm)
            scaled = ScaledBlock(d_model, layers, norm=norm)
            scaled.alpha = alpha
            return scaled

        blocks = [block(*layer) for layer in zip(mixing, with_experts)]
        head = nn.Linear(d_model, rows, bias=False)
        super().__init__(nn.Embedding(rows, d_model), blocks, head, norm=norm(d_model))
        if tie_embeddings:
            self.head.weight = self.embedding.weight
        self.vocab_size = vocab_size
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """See `causal_lm_`."""
        causal_lm_(self)


def make_mixers(
    pattern: str, n_layer: int, d_model: int, head_dim: int, given: Mapping[str, Mapping[str, Any]]
) -> list[nn.Module]:
    """The mixers of all layers. Raises ValueError for unknown letters and for a head_dim that does not fit."""
    if unknown := sorted(set(given) - set(MIXERS)):
        raise ValueError(f"mixers has unknown letters {', '.join(unknown)}; known are {', '.join(MIXERS)}")
    letters = layer_pattern(pattern, n_layer, {letter: letter for letter in MIXERS})
    if set(letters) - {"M"} and (d_model % head_dim or head_dim > d_model):
        raise ValueError(f"head_dim = {head_dim} must divide d_model = {d_model}")
    heads = d_model // head_dim
    defaults = {
        "M": {},
        "S": {"headdim": head_dim},
        "D": {"num_heads": max(1, 3 * heads // 4), "head_dim": head_dim},
        "K": {"num_heads": heads, "head_dim": head_dim},
        "L": {"num_heads": heads},
        "A": {"num_heads": heads, "qkv_proj_bias": False, "out_proj_bias": False},
    }

    def make(i: int, letter: str) -> nn.Module:
        where = {"layer": i, "n_layer": n_layer} if letter == "L" else {}
        arguments = defaults[letter] | dict(given.get(letter) or {})
        return from_slot(f"mixers.{letter}", arguments, MIXERS[letter], d_model, **where)

    return [make(i, letter) for i, letter in enumerate(letters)]


def width_for(parameters: int, fixed: int, each: int) -> int:
    """The d_ff with which `fixed` parameters, and `each` per unit of d_ff, come nearest to the number wanted."""
    if (width := round((parameters - fixed) / each)) < 1:
        raise ValueError(
            f"parameters = {parameters:,} leaves nothing for the feed-forward layers: embedding, head, norms and "
            f"mixers have {fixed:,}"
        )
    return width
