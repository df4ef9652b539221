"""state_fusion on our compiled CPU kernels (state_fusion.c)."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from ssmzoo.ops.checks import why_not_float
from ssmzoo.ops.library import Differentiable, Kernel
from ssmzoo.ops.native import kernel
from ssmzoo.ops.state_fusion import state_fusion, taps

FORWARD, MISSING = kernel("ssmzoo_state_fusion_forward")
BACKWARD, _ = kernel("ssmzoo_state_fusion_backward")


class Inputs(NamedTuple):
    """x (b d h w), weight (d 3 3 3): channel, dilation, row, column."""

    x: Tensor
    weight: Tensor


def _call(function, shape: torch.Size, *tensors: Tensor) -> None:
    values = (*shape, torch.get_num_threads(), *(t.data_ptr() for t in tensors))
    function((ctypes.c_int64 * len(values))(*values))


def forward(a: Inputs, save: bool):
    x, weight = a.x.float().contiguous(), a.weight.float().contiguous()
    y = torch.empty_like(x)
    _call(FORWARD, x.shape, x, weight, y)
    return (y.to(a.x.dtype),), None


def backward(a: Inputs, saved: None, dy: Tensor) -> dict[str, Tensor]:
    x, dy, weight = (t.float().contiguous() for t in (a.x, dy, a.weight))
    dx, parts = torch.empty_like(x), x.new_empty(x.shape[0], *weight.shape)
    _call(BACKWARD, x.shape, x, weight, dy, dx, parts)
    return {"x": dx.to(a.x.dtype), "weight": parts.sum(0).to(a.weight.dtype)}


FUSION = Differentiable("state_fusion", Inputs, like=lambda a: (a.x.new_empty(a.x.shape),))
FUSION.kernels["c"] = Kernel(forward, backward)


def why_not(a) -> str | None:
    return why_not_float(a.x, *a.kernels, a.alpha)


@state_fusion.register("c", device="cpu", missing=MISSING, unsupported=why_not)
def state_fusion_c(a) -> Tensor:
    return FUSION(Inputs(a.x, taps(a.kernels, a.alpha, torch.float32)), "c")
