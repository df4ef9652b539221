"""One token through all layers of a decoder in one operator, where every module is plain (`ssmzoo.layers.plain`).

    x <- x + mixer(RMSNorm(x))  for every layer, Mamba's and Mamba-2's mixers

A mixer tells by `layer(norm)` what the operator needs of it, or None where a module is to be called instead.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ssmzoo.layers.plain import is_plain
from ssmzoo.layers.quantized import QuantizedLinear
from ssmzoo.ops import linear_act, stack_step
from ssmzoo.ops.eager import eager
from ssmzoo.ops.stack_step import Integers, Mamba2Layer, MambaLayer

LINEARS = frozenset({nn.Linear, QuantizedLinear})
FEW = 8  # tokens for which a product is bound by reading the matrix


def layers_of(blocks: Sequence[nn.Module]) -> list[MambaLayer | Mamba2Layer] | None:
    """What `stack_step` needs of blocks, one mixer behind a norm each; None unless all of them may be passed over."""
    layers = []
    for block in blocks:
        layer = block.layer() if hasattr(block, "layer") else None
        if layer is None:
            return None
        layers.append(layer)
    return layers


def step(blocks: Sequence[nn.Module], x: Tensor, state: Sequence[tuple]) -> tuple[Tensor, tuple] | None:
    """x (b 1 d) and the layers' states -> the same behind all blocks; None: the blocks must be called one by one."""
    if not (x.is_cpu and x.dtype is torch.float32 or x.is_cuda) or not eager(x):
        return None
    if torch.is_autocast_enabled("cuda" if x.is_cuda else "cpu"):
        return None
    layers = layers_of(blocks)
    if layers is None:
        return None
    y, new = stack_step(x[:, 0], layers, state)
    return y[:, None], tuple(type(before)(*after) for before, after in zip(state, new))


def in_one_call(weight: Tensor) -> bool:
    """Whether `stack_step` takes weights of this kind: fp32, on a GPU 16 bits as well."""
    return weight.dtype is torch.float32 or weight.is_cuda and weight.is_floating_point()


def matrix(linear: nn.Module) -> Tensor | Integers | None:
    """The weights of a plain linear map as `stack_step` takes them; None if it is more than a product."""
    if not is_plain(linear, among=LINEARS):
        return None
    if type(linear) is nn.Linear:
        return linear.weight if in_one_call(linear.weight) else None
    if (
        linear.scale.dtype is not torch.float32
        or linear.activation != "float"
        or linear.rotate
        or linear.output is not None
    ):
        return None
    return Integers(linear.weight, linear.scale, linear.bits, linear.group_size)


def apply_linear(linear: nn.Module, x: Tensor) -> Tensor:
    """linear(x), which for few tokens reads the matrix once and at the speed of memory. x (... d) -> (... e)"""
    free = not torch.compiler.is_compiling() and not torch.is_grad_enabled()  # compiled programs may be for every size
    if free and x.numel() <= FEW * x.shape[-1] and is_plain(linear):
        return linear_act(x, linear.weight, linear.bias)
    return linear(x)
