"""gated_layer_norm on our compiled CPU kernels (gated_layer_norm.c): one pass over memory each way.

Torch takes three forwards, and keeps two results more for its gradients.
"""

from __future__ import annotations

import functools
import struct

import torch
from torch import Tensor

from ssmzoo.ops.eager import why_not_eager
from ssmzoo.ops.gated_layer_norm import gated_layer_norm
from ssmzoo.ops.gated_layer_norm.torch import NORM
from ssmzoo.ops.library import Kernel
from ssmzoo.ops.native import commit, kernel

FORWARD, MISSING = kernel("ssmzoo_gated_layer_norm")
BACKWARD, _ = kernel("ssmzoo_gated_layer_norm_backward")
ROWS = 64  # per task


def _rows(x: Tensor) -> Tensor:
    """(... d) -> (rows d), any row stride"""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def _call(function, a, more: list[Tensor | None]) -> None:
    given = [a.x.contiguous(), _rows(a.z), a.weight.contiguous(), a.bias.contiguous(), *more]
    pointers = (0 if t is None else t.data_ptr() for t in given)
    d = a.x.shape[-1]
    sizes = given[1].stride(0), a.x.numel() // d, d, ROWS, torch.get_num_threads()
    function(struct.pack("16qd", *pointers, *sizes, a.eps))


def forward(a, save: bool):
    y, moments = a.x.new_empty(a.x.shape), a.x.new_empty(2, a.x.numel() // a.x.shape[-1])
    commit(y)
    _call(FORWARD, a, [None, y, moments[0], moments[1], None, None, None])
    return (y,), moments  # mean and 1 / sqrt(variance + eps) of the rows


def backward(a, moments: Tensor, dy: Tensor) -> dict[str, Tensor]:
    dy, (mean, scale) = dy.contiguous(), moments
    dx, dz = torch.empty_like(dy), torch.empty_like(dy)
    sums = dy.new_empty(-(-mean.numel() // ROWS), 2, dy.shape[-1])
    commit(dx, dz)
    _call(BACKWARD, a, [dy, None, mean, scale, dx, dz, sums])
    dweight, dbias = sums.sum(0)
    return {"x": dx, "z": dz, "weight": dweight, "bias": dbias}


NORM.kernels["c"] = Kernel(forward, backward)


def why_not(a) -> str | None:
    return why_not_eager(a.x, a.z, a.weight, a.bias)


EAGERLY = functools.partial(NORM.eager, "c")
gated_layer_norm.register("c", device="cpu", missing=MISSING, unsupported=why_not, eager=EAGERLY)(
    lambda a: NORM(a, "c")
)
