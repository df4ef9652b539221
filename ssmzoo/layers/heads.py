"""From hidden vectors to what a task wants."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ssmzoo.layers.state import ModelOutput, left_align


class CausalLM(nn.Module):
    """A causal stack and a head over the vocabulary, tied to the embedding or not.

    backbone(ids (b l), state, mask=, seq_idx=) -> (hidden (b l d), state), with an attribute `embedding`
    """

    def __init__(self, backbone: nn.Module, tie_embeddings: bool = True):
        super().__init__()
        rows, d = backbone.embedding.weight.shape
        self.backbone = backbone
        self.lm_head = nn.Linear(d, rows, bias=False)
        if tie_embeddings:
            self.lm_head.weight = backbone.embedding.weight

    def forward(
        self, input_ids: Tensor, state: Any = None, *, mask: Tensor | None = None, seq_idx: Tensor | None = None
    ) -> ModelOutput:
        """input_ids (b l), or vectors (b l d); mask (b l) True = real token; seq_idx (b l) numbers packed documents."""
        if mask is not None and mask.shape != input_ids.shape[:2]:
            raise ValueError(f"mask has shape {tuple(mask.shape)}, input_ids want {tuple(input_ids.shape[:2])}")
        if input_ids.shape[1] == 0:
            raise ValueError("input_ids is empty: a sequence model needs at least one token per call")
        padding = left_align(mask)
        if padding is None:
            hidden, state = self.backbone(input_ids, state, seq_idx=seq_idx)
        else:
            hidden, state = self.backbone(
                padding.align(input_ids), state, mask=padding, seq_idx=padding.align_seq_idx(seq_idx)
            )
            hidden = padding.restore(hidden)
        return ModelOutput(self.lm_head(hidden), state, {})

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping what it computed."""
        self.backbone.grad_checkpointing = enable
