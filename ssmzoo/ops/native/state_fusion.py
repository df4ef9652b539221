"""state_fusion on our compiled CPU kernels (state_fusion.c)."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ssmzoo.ops.dispatch import differentiate
from ssmzoo.ops.native import kernel, why_not_float
from ssmzoo.ops.state_fusion import state_fusion, taps

FORWARD, MISSING = kernel("ssmzoo_state_fusion_forward")
BACKWARD, _ = kernel("ssmzoo_state_fusion_backward")

_LIBRARY = torch.library.Library("ssmzoo", "FRAGMENT")
_LIBRARY.define("state_fusion(Tensor x, Tensor weight) -> Tensor")
_LIBRARY.define("state_fusion_backward(Tensor dy, Tensor x, Tensor weight) -> (Tensor, Tensor)")


def _call(function, shape: torch.Size, *tensors: Tensor) -> None:
    values = (*shape, torch.get_num_threads(), *(t.data_ptr() for t in tensors))
    function((ctypes.c_int64 * len(values))(*values))


def _forward(x: Tensor, weight: Tensor) -> Tensor:
    """x (b d h w), weight (d 3 3 3) -> (b d h w) in x's dtype"""
    x32, weight = x.float().contiguous(), weight.float().contiguous()
    y = torch.empty_like(x32)
    _call(FORWARD, x.shape, x32, weight, y)
    return y.to(x.dtype)


def _backward(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    x32, dy32, weight32 = (t.float().contiguous() for t in (x, dy, weight))
    dx, parts = torch.empty_like(x32), x32.new_empty(x.shape[0], *weight.shape)
    _call(BACKWARD, x.shape, x32, weight32, dy32, dx, parts)
    return dx.to(x.dtype), parts.sum(0).to(weight.dtype)


_LIBRARY.impl("state_fusion", _forward, "CPU")
_LIBRARY.impl("state_fusion_backward", _backward, "CPU")


@torch.library.register_fake("ssmzoo::state_fusion", lib=_LIBRARY)
def _forward_fake(x, weight):
    return x.new_empty(x.shape)


@torch.library.register_fake("ssmzoo::state_fusion_backward", lib=_LIBRARY)
def _backward_fake(dy, x, weight):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


differentiate("state_fusion", _LIBRARY)


def _why_not(x, kernels, alpha):
    return why_not_float(x, *kernels, alpha)


@state_fusion.register("native", device="cpu", missing=MISSING, unsupported=_why_not)
def state_fusion_native(x, kernels, alpha):
    return torch.ops.ssmzoo.state_fusion(x, taps(kernels, alpha, torch.float32))
