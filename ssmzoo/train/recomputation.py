"""Recomputation of activations in the backward pass: switching it on."""

from __future__ import annotations

from torch import nn

from ssmzoo.layers.decoder import Decoder
from ssmzoo.train.errors import UserError


def set_recomputation(model: nn.Module, how: bool | str) -> None:
    """grad_checkpointing=how; raises UserError for a model that does not know it."""
    if not hasattr(model, "set_grad_checkpointing"):
        raise UserError(f"grad_checkpointing={how}: {type(model).__name__} has no set_grad_checkpointing()")
    if isinstance(how, str) and not is_decoder(model):
        if how == "selective":
            raise UserError(
                f"grad_checkpointing=selective: {type(model).__name__} recomputes whole blocks only; use true"
            )
        how = True
    model.set_grad_checkpointing(how)


def is_decoder(model: nn.Module) -> bool:
    return any(isinstance(m, Decoder) for m in model.modules())
