"""Float layers -> layers of integers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ssmzoo.adapt.quantise.gptq import gptq
from ssmzoo.adapt.quantise.plan import Settings
from ssmzoo.adapt.quantise.points import Points
from ssmzoo.adapt.quantise.quantisers import Codes, eight_bit, four_bit, per_tensor
from ssmzoo.layers.hadamard import HadamardLinear
from ssmzoo.layers.quantized import QuantizedConv1d, QuantizedEmbedding, QuantizedLinear
from ssmzoo.ops.quantized_linear import DYNAMIC, pack_int4

EIGHT_BITS = ("dt_proj",)  # few inputs, and they set the time step


def linear_bits(name: str, linear: nn.Linear, settings: Settings) -> int:
    """4 bits where the mode says so, but for dt_proj and odd numbers of inputs, which do not pack."""
    four = settings.bits(name) == 4 and name.rpartition(".")[2] not in EIGHT_BITS and linear.in_features % 2 == 0
    return 4 if four else 8


def codes_of(weight: Tensor, bits: int, settings: Settings, hessian: Tensor | None = None) -> Codes:
    """Integers for a matrix: GPTQ where there is a Hessian of inputs that were seen, else rounding to nearest."""
    weight = weight.detach().float()
    if bits == 8:
        return eight_bit(weight)
    size = min(settings.group_size, weight.shape[1])
    if hessian is not None and hessian.any():
        return gptq(weight, hessian, 4, size, settings.damping, settings.half)
    return four_bit(weight, size)


@torch.no_grad()
def quantised_linear_layer(name: str, linear: nn.Linear, codes: Codes, bits: int, points: Points) -> QuantizedLinear:
    """The layer of integers for a linear layer, with the scales of its activations."""
    known = name in points.inputs
    made = QuantizedLinear(
        linear.in_features,
        linear.out_features,
        bits,
        codes.group_size,
        activation="static" if known else "float",
        rotate=isinstance(linear, HadamardLinear),
        rounded=name in points.outputs,
        bias=linear.bias is not None,
    )
    made.weight.copy_(pack_int4(codes.q) if bits == 4 else codes.q)
    made.scale.copy_(codes.scale)
    if linear.bias is not None:
        made.bias.copy_(linear.bias)
    if known:
        made.act_scale.copy_(points.input_scale(name))
    if made.output is not None:
        made.output.scale.copy_(points.output_scale(name))
    return made.train(linear.training)


def dynamic(layer: QuantizedLinear) -> QuantizedLinear:
    """The same layer with activations that are scaled token by token."""
    layer.activation, layer.act_scale = DYNAMIC, None
    return layer


@torch.no_grad()
def quantised_conv(name: str, conv: nn.Conv1d, points: Points) -> QuantizedConv1d:
    """8 bits for taps and bias, one scale each per part of the channels (x, B, C)."""
    made = QuantizedConv1d(conv.out_channels, conv.kernel_size[0], name in points.outputs, conv.bias is not None)
    at = 0
    for _, width in points.outputs.get(name, [(None, conv.out_channels)]):
        part = slice(at, at + width)
        q, scale = per_tensor(conv.weight[part].float())
        made.weight[part], made.scale[part] = q, scale
        if conv.bias is not None:
            q, scale = per_tensor(conv.bias[part].float())
            made.bias[part], made.bias_scale[part] = q, scale
        at += width
    if made.output is not None:
        made.output.scale.copy_(points.output_scale(name))
    return made.train(conv.training)


@torch.no_grad()
def quantised_embedding(embedding: nn.Embedding, codes: Codes, bits: int) -> QuantizedEmbedding:
    made = QuantizedEmbedding(embedding.num_embeddings, embedding.embedding_dim, bits, codes.group_size)
    made.weight.copy_(pack_int4(codes.q) if bits == 4 else codes.q)
    made.scale.copy_(codes.scale)
    return made.train(embedding.training)


def share(embedding: QuantizedEmbedding, head: QuantizedLinear) -> None:
    """A tied table: both read the same integers and scales."""
    embedding.weight, embedding.scale = head.weight, head.scale
    embedding.bits, embedding.group_size = head.bits, head.group_size


def put(model: nn.Module, made: Mapping[str, nn.Module]) -> None:
    for name, module in made.items():
        model.set_submodule(name, module)
