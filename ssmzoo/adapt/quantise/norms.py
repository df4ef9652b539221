"""Norms without weights: what a norm multiplies by and adds moves into the layers behind it.

    W norm(x) = (W diag(w)) RMS(x) + W b

A rotation may pass a norm only where w = 1 and b = 0, so this comes first. The function stays the same.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ssmzoo.adapt.quantise.structure import skeleton
from ssmzoo.layers.feedforward.router import Router
from ssmzoo.layers.norm import LayerNorm, RMSNorm

NORMS = (RMSNorm, LayerNorm, nn.LayerNorm)


@torch.no_grad()
def fuse_norms(model: nn.Module) -> nn.Module:
    """Move the weights of all norms of a language model into the layers that read them; in place.

    A head that is tied to the embedding keeps the final norm as it is. Raises ValueError for a residual that starts
    behind the norm, and for norms and layers that are not known.
    """
    parts = skeleton(model)
    for group in parts.groups():
        if parts.blocks[group.block].residual is not None:
            raise ValueError(
                f"block {group.block} adds what its norm gives to the residual stream, so the norm's weights cannot "
                "move; quantise without rotation (--no-rotate, rotate=False)"
            )
        fuse(group.norm, group.sides.readers, group.name)
    if parts.norm is not None and not parts.tied:
        fuse(parts.norm, [parts.head], parts.norm_name)
    return model


def untie(model: nn.Module) -> nn.Module:
    """Give the head a weight of its own, in place: after fusing and rotating it differs from the embedding's."""
    parts = skeleton(model)
    if parts.tied:
        parts.head.weight = nn.Parameter(parts.head.weight.detach().clone(), requires_grad=False)
    return model


def fuse(norm: nn.Module, readers: list[nn.Module], name: str) -> None:
    if not isinstance(norm, NORMS):
        raise ValueError(f"{name} is {type(norm).__name__}; known are RMSNorm and LayerNorm: use --no-rotate")
    weight, bias = norm.weight.double(), getattr(norm, "bias", None)
    for reader in readers:
        if bias is not None and bias.any():
            add_bias(reader, bias.double())
        scale_columns(reader, weight)
    norm.weight.fill_(1)
    if bias is not None:
        bias.zero_()


def scale_columns(reader: nn.Module, weight: Tensor) -> None:
    """Multiply every input of a reader by a number, in its weights."""
    if isinstance(reader, Router):
        reader.gate.copy_(reader.gate.double() * weight[:, None])
    else:
        reader.weight.copy_(reader.weight.double() * weight)


def add_bias(reader: nn.Module, shift: Tensor) -> None:
    """Add what a constant shift of the inputs gives to the reader's bias, which is made where there is none."""
    name = "gate_bias" if isinstance(reader, Router) else "bias"
    matrix = reader.gate.T if isinstance(reader, Router) else reader.weight
    added, old = matrix.double() @ shift, getattr(reader, name)
    if old is None and name == "bias":
        reader.added_bias = True  # a float layer that keeps it is stored with it
    total = added if old is None else old.double() + added
    setattr(reader, name, nn.Parameter(total.to(matrix.dtype), requires_grad=False))
