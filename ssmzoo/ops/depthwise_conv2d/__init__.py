"""Depthwise convolution of channels-last maps, with the activations and the sum around it.

Letters: b batch, h rows, w columns, d channels, k side of the kernel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmzoo.ops.checks import expect_floats
from ssmzoo.ops.dispatch import op

ACTIVATIONS = {None: lambda x: x, "gelu": F.gelu, "relu": F.relu, "sigmoid": torch.sigmoid, "silu": F.silu}


def check_depthwise_conv2d(a) -> None:
    expect_floats(a, {"1": 1}, x="bhwd", weight="d1kk", bias="d")
    if a.act not in ACTIVATIONS:
        raise ValueError(f"act = {a.act!r}, expected one of {', '.join(map(repr, ACTIVATIONS))}")
    if a.stride not in (1, 2):
        raise ValueError(f"stride = {a.stride!r}, expected 1 or 2")
    if a.residual and (a.stride != 1 or a.act is not None or a.rectify or a.weight.shape[-1] % 2 == 0):
        raise ValueError(
            f"residual=True adds x to a map of its size, without activations: expected stride 1, an odd "
            f"kernel, act=None and rectify=False, got {a.stride}, {a.weight.shape[-1]}, {a.act!r}, {a.rectify}"
        )


@op(check=check_depthwise_conv2d)
def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    act: str | None = None,
    stride: int = 1,
    residual: bool = False,
    rectify: bool = False,
) -> Tensor:
    """y = act(sum over taps of weight * x[neighbour] + bias), zeros around the map.

    x        (b h w d)    any strides; the C backend reads it as it is if the channels lie side by side
    weight   (d 1 k k)    bias (d); padding (k - 1) // 2
    act      None, "gelu", "relu", "sigmoid" or "silu" behind the sum; rectify: relu(x) in the place of x
    stride   1 or 2
    residual x is added to the sum
    returns  (b h' w' d)  in x's dtype, h' = (h - 1) // stride + 1 for an odd kernel

    The C backend serves 3x3 in fp32, with ReLU or SiLU. It keeps three rows in cache and nothing for its backward
    but x, from which that computes the sum anew. Raises ValueError naming the argument, its shape and the one expected.
    """
    k = weight.shape[-1]
    pad = (k - 1) // 2
    padded = F.pad(F.relu(x) if rectify else x, (0, 0, pad, pad, pad, pad))
    windows = padded.unfold(1, k, stride).unfold(2, k, stride)  # (b h' w' d k k)
    y = (windows * weight[:, 0]).sum((-2, -1))
    y = y if bias is None else y + bias
    return ACTIVATIONS[act](x + y if residual else y)
