"""Modules of torch in one operator with what surrounds them, on channels-last maps (b y x d) or tokens (... d).

Every function calls its module as it stands, unless the module is exactly torch's class without hooks (`is_plain`):
then the operator reads its weights and saves passes over memory. Both ways compute the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssmzoo.layers.plain import is_plain
from ssmzoo.ops import causal_conv1d_fn, depthwise_conv2d, gated_layer_norm, linear_act

ACTIVATIONS = {None: lambda x: x, "silu": F.silu, "gelu": F.gelu, "relu": F.relu, "sigmoid": torch.sigmoid}


def fused_linear(linear: nn.Module, x: Tensor, act: str | None = None) -> Tensor:
    """act(linear(x)), (... d) -> (... e); act None, "silu", "gelu" (exact), "relu" or "sigmoid"."""
    if act != "sigmoid" and is_plain(linear):
        return linear_act(x, linear.weight, linear.bias, act)
    return ACTIVATIONS[act](linear(x))


def fused_pointwise(conv: nn.Module, x: Tensor) -> Tensor:
    """A 1x1 convolution as the matrix product that it is, (b y x d) -> (b y x e)."""
    if is_plain(conv):
        return linear_act(x, conv.weight.flatten(1), conv.bias)
    return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def depthwise_conv(dim: int, kernel: int = 3, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    """A depthwise convolution with (kernel - 1) // 2 zeros around the map."""
    return nn.Conv2d(dim, dim, kernel, stride, padding=(kernel - 1) // 2, groups=dim, bias=bias)


def fused_depthwise(
    conv: nn.Module, x: Tensor, act: str | None = None, residual: bool = False, rectify: bool = False
) -> Tensor:
    """act(conv(x)) for a `depthwise_conv`, (b y x d) -> (b y' x' d).

    act  None, "silu", "gelu", "relu" or "sigmoid" | residual  x + conv(x) | rectify  relu(x) in the place of x
    """
    if is_plain(conv):
        return depthwise_conv2d(x, conv.weight, conv.bias, act, conv.stride[0], residual, rectify)
    y = ACTIVATIONS[act](conv((F.relu(x) if rectify else x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
    return x + y if residual else y


def fused_causal_convs(convs: Sequence[nn.Module], xs: Tensor) -> Tensor:
    """SiLU(causal convolution k of sequence k), (b k e l) -> (b k e l); depthwise nn.Conv1d with taps - 1 zeros."""
    if not is_plain(*convs):
        pairs = zip(convs, xs.unbind(1))
        return torch.stack([F.silu(conv(x)[..., : x.shape[-1]]) for conv, x in pairs], dim=1)
    weight = torch.cat([conv.weight.squeeze(1) for conv in convs])  # (ke taps)
    bias = None if convs[0].bias is None else torch.cat([conv.bias for conv in convs])
    return causal_conv1d_fn(xs.flatten(1, 2), weight, bias, activation="silu").unflatten(1, xs.shape[1:3])


def fused_gated_norm(norm: nn.Module, y: Tensor, z: Tensor) -> Tensor:
    """LayerNorm(y) SiLU(z); y, z (... d) -> (... d)"""
    if is_plain(norm):
        return gated_layer_norm(y, z, norm.weight, norm.bias, norm.eps)
    return norm(y) * F.silu(z)


def conv_map(conv: nn.Module, x: Tensor, weights: int = 0) -> Tensor:
    """A convolution of a channels-last map, (b y x d) -> (b y' x' e).

    weights  how many the convolution has: a map of fewer numbers is copied to rows last, as the weights lie, since
             torch would rearrange these in every call. Compiled graphs and exports choose their layouts themselves.
    """
    x = x.permute(0, 3, 1, 2)
    if not torch.compiler.is_compiling() and x.numel() < weights:
        x = x.contiguous()
    return conv(x).permute(0, 2, 3, 1)
