"""Mamba: a language model of nothing but selective SSM blocks, and the presets of its paper.

    x <- x + Mamba(RMSNorm(x)) for every layer;   logits = W_head RMSNorm(x), W_head tied to the embedding

The mixer and its equations are in layers/mixers/mamba.py, the skeleton in layers/decoder.py. A layer pattern puts
multi-head attention in the place of some SSMs; `d_intermediate` adds a gated MLP per block.
Paper and code differ in B: the paper's formula discretises it exactly (ZOH), the code and we use dt B.
Source: Gu & Dao 2023 (arXiv 2312.00752); state-spaces/mamba models/mixer_seq_simple.py (Apache-2.0) for names, the
initialisation and the checkpoints; Hugging Face transformers models/mamba (Apache-2.0) for the second naming.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ssmzoo.layers.decoder import BackboneLM, Block, Decoder, layer_pattern, padded_vocab_size
from ssmzoo.layers.feedforward.mlp import GatedMLP
from ssmzoo.layers.init import scaled_output_
from ssmzoo.layers.mixers.attention import MHA
from ssmzoo.layers.mixers.mamba import Mamba
from ssmzoo.layers.norm import LayerNorm, RMSNorm
from ssmzoo.suggest import from_slot


class MambaBlock(Block):
    """A mixer and, if d_intermediate > 0, a gated MLP, under the names of the released checkpoints."""

    def __init__(self, mixer: nn.Module, d_model: int, d_intermediate: int, norm):
        nn.Module.__init__(self)
        self.mixer, self.norm = mixer, norm(d_model)
        self.mlp = GatedMLP(d_model, d_intermediate) if d_intermediate else None
        self.norm2 = norm(d_model) if d_intermediate else None
        self.set_kinds({"mixer": mixer} | ({"mlp": self.mlp} if d_intermediate else {}))
        self.parallel = False

    program = Block.program

    def sublayers(self):
        first = ("mixer", self.norm, self.mixer)
        return [first] if self.mlp is None else [first, ("mlp", self.norm2, self.mlp)]


class MambaBackbone(Decoder):
    """The decoder under the names of the released checkpoints."""

    blocks_name, norm_name = "layers", "norm_f"


class MambaLM(BackboneLM):
    """ids (b l) -> ModelOutput(logits (b l v), state, {}); the defaults are the paper's 130M model.

    vocab_size, pad_vocab_size_multiple   v is vocab_size rounded up to a multiple
    d_model, n_layer      width and number of blocks
    d_intermediate        hidden width of a gated MLP in every block (rounded up to 128); 0: none
    ssm_cfg               arguments of the mixer (ssmzoo.layers.mixers.mamba.Mamba), e.g. {"d_state": 32}
    layer_pattern         one letter per layer, M for the mixer and A for attention; a shorter pattern repeats
    attn_layer_idx        the same by the numbers of the layers that carry attention
    attn_cfg              arguments of the attention (ssmzoo.layers.mixers.attention.MHA)
    rms_norm, norm_eps    RMSNorm, or LayerNorm
    residual_in_fp32      keep the residual stream in fp32 when the model computes in lower precision
    tie_embeddings        the head's weight is the embedding's
    """

    mixer = Mamba

    def __init__(
        self,
        vocab_size: int = 50277,
        d_model: int = 768,
        n_layer: int = 24,
        d_intermediate: int = 0,
        ssm_cfg: Mapping[str, Any] | None = None,
        attn_layer_idx: Sequence[int] = (),
        attn_cfg: Mapping[str, Any] | None = None,
        rms_norm: bool = True,
        norm_eps: float = 1e-5,
        residual_in_fp32: bool = True,
        tie_embeddings: bool = True,
        pad_vocab_size_multiple: int = 8,
        layer_pattern: str | None = None,
    ):
        super().__init__()
        if d_model < 1 or n_layer < 1 or d_intermediate < 0:
            raise ValueError(
                f"need d_model and n_layer >= 1 and d_intermediate >= 0, got d_model={d_model}, "
                f"n_layer={n_layer}, d_intermediate={d_intermediate}"
            )
        kinds = letters(layer_pattern, attn_layer_idx, n_layer)
        if ("A" in kinds) != bool(attn_cfg):
            raise ValueError(
                f"attn_cfg={attn_cfg} with layers {''.join(kinds)}: give attn_cfg (at least num_heads) if and only if "
                "layer_pattern or attn_layer_idx puts attention into some layer"
            )
        norm = functools.partial(RMSNorm if rms_norm else LayerNorm, eps=norm_eps)
        blocks = (
            MambaBlock(
                from_slot("attn_cfg", attn_cfg, MHA, d_model)
                if kind == "A"
                else from_slot("ssm_cfg", ssm_cfg, self.mixer, d_model),
                d_model,
                d_intermediate,
                norm,
            )
            for kind in kinds
        )
        rows = padded_vocab_size(vocab_size, pad_vocab_size_multiple)
        self.backbone = MambaBackbone(nn.Embedding(rows, d_model), blocks, norm(d_model), residual_in_fp32)
        self.lm_head = nn.Linear(d_model, rows, bias=False)
        if tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight
        self.vocab_size = vocab_size
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """embedding               N(0, 0.02)
        out_proj, fc2           torch's Linear default / sqrt(n_layer)
        biases of projections   0 (dt_proj's is part of the time step and stays)
        all else                the mixers' own; torch's default for what they leave open; norms 1
        """
        nn.init.normal_(self.backbone.embedding.weight, std=0.02)
        for name, module in self.backbone.named_modules():
            leaf = name.rpartition(".")[2]
            if leaf in ("out_proj", "fc2"):
                scaled_output_(module.weight, len(self.backbone.layers))
            if isinstance(module, nn.Linear) and module.bias is not None and leaf != "dt_proj":
                nn.init.zeros_(module.bias)


def letters(pattern: str | None, attn_layer_idx: Sequence[int], n_layer: int) -> list[str]:
    """M or A for every layer, from a pattern or from the numbers of the attention layers."""
    attention = set(attn_layer_idx)
    if pattern is not None:
        if attention:
            raise ValueError(f"give layer_pattern or attn_layer_idx, not both; got {pattern!r} and {sorted(attention)}")
        return layer_pattern(pattern, n_layer, {"M": "M", "A": "A"})
    if not attention <= set(range(n_layer)):
        raise ValueError(f"attn_layer_idx={list(attn_layer_idx)} must lie in 0..{n_layer - 1}")
    return ["A" if i in attention else "M" for i in range(n_layer)]
