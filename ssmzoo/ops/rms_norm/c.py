"""rms_norm on our compiled CPU kernels (rms_norm.c); torch composes it of eight passes over memory."""

from __future__ import annotations

import functools
import struct

import torch
from torch import Tensor

from ssmzoo.ops.eager import why_not_eager
from ssmzoo.ops.library import Kernel
from ssmzoo.ops.native import commit, kernel
from ssmzoo.ops.rms_norm import rms_norm
from ssmzoo.ops.rms_norm.torch import NORM

FORWARD, MISSING = kernel("ssmzoo_rms_norm")
BACKWARD, _ = kernel("ssmzoo_rms_norm_backward")
ROWS = 64  # per task
LAYOUT = "11qd"  # x, weight, dy, y, scale, dx, dweight; rows, dim, rows per task, threads; eps


def forward(a, save: bool):
    """The rows' 1 / sqrt(mean(x^2) + eps) are kept."""
    x, weight, dim = a.x.contiguous(), a.weight.contiguous(), a.x.shape[-1]
    y, scale = torch.empty_like(x), x.new_empty(x.shape[:-1]) if save else None
    commit(y)
    pointers = x.data_ptr(), weight.data_ptr(), 0, y.data_ptr(), scale.data_ptr() if save else 0, 0, 0
    FORWARD(struct.pack(LAYOUT, *pointers, x.numel() // dim, dim, ROWS, torch.get_num_threads(), a.eps))
    return (y,), scale


def backward(a, scale: Tensor, dy: Tensor) -> dict[str, Tensor]:
    dy = dy.contiguous()
    dx, parts = torch.empty_like(dy), dy.new_empty(-(-scale.numel() // ROWS), dy.shape[-1])
    commit(dx)
    x, weight, dim = a.x.contiguous(), a.weight.contiguous(), a.x.shape[-1]
    pointers = [t.data_ptr() for t in (x, weight, dy)] + [0] + [t.data_ptr() for t in (scale, dx, parts)]
    BACKWARD(struct.pack(LAYOUT, *pointers, x.numel() // dim, dim, ROWS, torch.get_num_threads(), a.eps))
    return {"x": dx, "weight": parts.sum(0)}


NORM.kernels["c"] = Kernel(forward, backward)


def why_not(a) -> str | None:
    if a.residual is not None:
        return "takes no residual: the torch form adds it and calls this"
    if not a.x.shape[-1]:
        return "has nothing to do for empty rows"
    return why_not_eager(a.x, a.weight, autocast=True, empty=True)


EAGERLY = functools.partial(NORM.eager, "c")
rms_norm.register("c", device="cpu", missing=MISSING, unsupported=why_not, eager=EAGERLY)(lambda a: NORM(a, "c"))
