"""A language model whose residual stream lives in a rotated basis, T of `ssmzoo.layers.hadamard`.

    E <- E T_m;   W_in <- W_in T_m;   W_out <- T_m^T W_out T_i, its input rotated online;   W_head <- W_head T_m

T_m is of the model's width, T_i of a mixer's inner width. The function stays the same, norms must be fused before.
A tied head keeps sharing the embedding's table: the final norm, with its weight, then works in the old basis.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ssmzoo.adapt.quantise.structure import skeleton
from ssmzoo.layers.feedforward.router import Router
from ssmzoo.layers.hadamard import CentredNorm, HadamardLinear, Rotated, expect_order, hadamard


@torch.no_grad()
def rotate(model: nn.Module) -> nn.Module:
    """Rotate the residual stream and what stands before the mixers' output projections; in place.

    Raises ValueError for widths without a Hadamard matrix and for norms that are not fused.
    """
    parts = skeleton(model)
    groups = list(parts.groups())
    expect_order("d_model", parts.embedding.embedding_dim)
    for group in groups:
        if (group.norm.weight != 1).any() or getattr(group.norm, "bias", None) is not None and group.norm.bias.any():
            raise ValueError(f"{group.name} still has weights: fuse_norms comes before rotate")
        for linear in group.sides.online:
            expect_order(f"the inner width of block {group.block}", linear.in_features)
    for group in groups:
        centre(model, group.name, group.norm)
        for reader in group.sides.readers:
            rotate_inputs(reader)
        for writer in group.sides.writers:
            rotate_outputs(writer)
        for writer in group.sides.online:
            rotate_inputs(writer)
            model.set_submodule(parts.names[id(writer)], with_rotation(writer))
    turned(parts.embedding.weight)
    if parts.tied and parts.norm is not None:
        model.set_submodule(parts.norm_name, Rotated(parts.norm).train(parts.norm.training))
    elif not parts.tied:
        turned(parts.head.weight)
        if parts.norm is not None:
            centre(model, parts.norm_name, parts.norm)
    return model


def turned(weight: Tensor) -> None:
    """Rows times T, computed in float64."""
    weight.copy_(hadamard(weight.double()))


def rotate_inputs(reader: nn.Module) -> None:
    if isinstance(reader, Router):
        reader.gate.copy_(hadamard(reader.gate.double().T).T)
    else:
        turned(reader.weight)


def rotate_outputs(writer: nn.Linear) -> None:
    writer.weight.copy_(hadamard(writer.weight.double().T).T)
    if writer.bias is not None:
        turned(writer.bias)


def centre(model: nn.Module, name: str, norm: nn.Module) -> None:
    """RMSNorm without weights turns with the stream; LayerNorm has to know where the vector of ones went."""
    if isinstance(norm, nn.LayerNorm):
        made = CentredNorm(norm.normalized_shape[0], norm.eps).to(norm.weight)
        model.set_submodule(name, made.train(norm.training))


def with_rotation(linear: nn.Linear) -> HadamardLinear:
    made = HadamardLinear(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
    made.weight, made.bias = linear.weight, linear.bias
    return made.train(linear.training)
