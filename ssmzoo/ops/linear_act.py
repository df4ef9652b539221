"""A linear map with its bias and the activation behind it, in as few passes over memory as can be.

Letters: d inputs, e outputs.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ssmzoo.ops.checks import expect_floats
from ssmzoo.ops.dispatch import op

ACTIVATIONS = {None: lambda x: x, "gelu": F.gelu, "relu": F.relu, "silu": F.silu}


def check_linear_act(x, weight, bias=None, act=None) -> None:
    if act not in ACTIVATIONS:
        raise ValueError(f"act = {act!r}, expected one of {', '.join(map(repr, ACTIVATIONS))}")
    if weight.ndim != 2 or x.ndim < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}, expected (... d) and (e d)")
    expect_floats(x.device, x=x, weight=weight, bias=bias)


@op(check=check_linear_act)
def linear_act(x: Tensor, weight: Tensor, bias: Tensor | None = None, act: str | None = None) -> Tensor:
    """act(x W^T + bias): x (... d), weight (e d), bias (e), act None, "gelu" (exact), "relu" or "silu" -> (... e)

    The native backend computes in fp32, on oneDNN and kernels of our own.
    Raises ValueError for shapes that do not fit or an unknown activation.
    """
    y = (x.unsqueeze(-2) * weight).sum(-1)
    return ACTIVATIONS[act](y if bias is None else y + bias)


@linear_act.register("torch")
def linear_act_torch(x, weight, bias=None, act=None):
    return ACTIVATIONS[act](F.linear(x, weight, bias))
