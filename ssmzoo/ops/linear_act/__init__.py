"""A linear map with its bias and the activation behind it, in as few passes over memory as can be.

Letters: d inputs, e outputs.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ssmzoo.ops.checks import expect_floats
from ssmzoo.ops.dispatch import op

ACTIVATIONS = {None: lambda x: x, "gelu": F.gelu, "relu": F.relu, "silu": F.silu}


def check_linear_act(a) -> None:
    if a.act not in ACTIVATIONS:
        raise ValueError(f"act = {a.act!r}, expected one of {', '.join(map(repr, ACTIVATIONS))}")
    if a.weight.ndim != 2 or a.x.ndim < 1 or a.x.shape[-1] != a.weight.shape[1]:
        shapes = f"x has shape {tuple(a.x.shape)} and weight {tuple(a.weight.shape)}"
        raise ValueError(f"{shapes}, expected (... d) and (e d)")
    expect_floats(a, {}, x="...", weight="ed", bias="e")


@op(check=check_linear_act)
def linear_act(x: Tensor, weight: Tensor, bias: Tensor | None = None, act: str | None = None) -> Tensor:
    """act(x W^T + bias): x (... d), weight (e d), bias (e), act None, "gelu" (exact), "relu" or "silu" -> (... e)

    The C backend computes in fp32, on oneDNN and kernels of our own.
    Raises ValueError for shapes that do not fit or an unknown activation.
    """
    y = (x.unsqueeze(-2) * weight).sum(-1)
    return ACTIVATIONS[act](y if bias is None else y + bias)
