"""Mamba: a language model of nothing but selective SSM blocks, and the presets of its paper.

    x <- x + Mamba(RMSNorm(x)) for every layer;   logits = W_head RMSNorm(x), W_head tied to the embedding

The mixer and its equations are in layers/mixers/mamba.py, the residual container in ssmzoo/layers/stack.py. Layers
listed in `attn_layer_idx` carry multi-head attention instead of the SSM; `d_intermediate` adds a gated MLP per block.
Paper and code differ in B: the paper's formula discretises it exactly (ZOH), the code and we use dt B.
Source: Gu & Dao 2023 (arXiv 2312.00752); state-spaces/mamba models/mixer_seq_simple.py (Apache-2.0) for names, the
initialisation and the checkpoints; Hugging Face transformers models/mamba (Apache-2.0) for the second naming.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ssmzoo.layers.embed import padded_vocab_size
from ssmzoo.layers.heads import CausalLM
from ssmzoo.layers.init import scaled_output_
from ssmzoo.layers.mixers.mamba import Mamba
from ssmzoo.layers.mixers.mha import MHA
from ssmzoo.layers.stack import Stack


class MambaLM(CausalLM):
    """ids (b l) -> ModelOutput(logits (b l v), state, {}); the defaults are the paper's 130M model.

    vocab_size, pad_vocab_size_multiple   v is vocab_size rounded up to a multiple
    d_model, n_layer      width and number of blocks
    d_intermediate        hidden width of a gated MLP in every block (rounded up to 128); 0: none
    ssm_cfg               arguments of the mixer (ssmzoo.layers.mixers.mamba.Mamba), e.g. {"d_state": 32}
    attn_layer_idx, attn_cfg              layers that carry attention, and the arguments of ssmzoo.layers.mixers.mha.MHA
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
    ):
        if d_model < 1 or n_layer < 1 or d_intermediate < 0:
            raise ValueError(
                f"need d_model and n_layer >= 1 and d_intermediate >= 0, got d_model={d_model}, "
                f"n_layer={n_layer}, d_intermediate={d_intermediate}"
            )
        attention = set(attn_layer_idx)
        if not attention <= set(range(n_layer)) or (attention and not attn_cfg):
            raise ValueError(
                f"attn_layer_idx={list(attn_layer_idx)} must lie in 0..{n_layer - 1} and needs attn_cfg "
                f"with at least num_heads, got attn_cfg={attn_cfg}"
            )
        mixers = (
            MHA(d_model, **attn_cfg) if i in attention else self.mixer(d_model, **(ssm_cfg or {}))
            for i in range(n_layer)
        )
        rows = padded_vocab_size(vocab_size, pad_vocab_size_multiple)
        super().__init__(
            Stack(rows, d_model, mixers, d_intermediate, rms_norm, norm_eps, residual_in_fp32), tie_embeddings
        )
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
