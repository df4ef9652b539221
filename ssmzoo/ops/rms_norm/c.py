"""rms_norm on our compiled CPU kernels (rms_norm.c); torch composes it of eight passes over memory."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from ssmzoo.ops.eager import why_not_eager
from ssmzoo.ops.library import Differentiable, Kernel
from ssmzoo.ops.native import commit, kernel
from ssmzoo.ops.rms_norm import rms_norm
from ssmzoo.ops.rms_norm.torch import rms_norm_torch

FORWARD, MISSING = kernel("ssmzoo_rms_norm")
BACKWARD, _ = kernel("ssmzoo_rms_norm_backward")
ROWS = 64  # per task


def _call(function, a, dy=None, y=None, scale=None, dx=None, dweight=None) -> None:
    x, weight, dim = a.x.contiguous(), a.weight.contiguous(), a.x.shape[-1]
    pointers = [0 if t is None else t.data_ptr() for t in (x, weight, dy, y, scale, dx, dweight)]
    function(struct.pack("11qd", *pointers, x.numel() // dim, dim, ROWS, torch.get_num_threads(), a.eps))


def forward(a, save: bool):
    """The rows' 1 / sqrt(mean(x^2) + eps) are kept."""
    y, scale = torch.empty_like(a.x.contiguous()), a.x.new_empty(a.x.shape[:-1]) if save else None
    commit(y)
    _call(FORWARD, a, y=y, scale=scale)
    return (y,), scale


def backward(a, scale: Tensor, dy: Tensor) -> dict[str, Tensor]:
    dy = dy.contiguous()
    dx, parts = torch.empty_like(dy), dy.new_empty(-(-scale.numel() // ROWS), dy.shape[-1])
    commit(dx)
    _call(BACKWARD, a, dy=dy, scale=scale, dx=dx, dweight=parts)
    return {"x": dx, "weight": parts.sum(0)}


NORM = Differentiable("rms_norm", rms_norm.Arguments, saved="scale", twice=rms_norm_torch)
NORM.kernels["c"] = Kernel(forward, backward)


def why_not(a) -> str | None:
    if not a.x.shape[-1]:
        return "has nothing to do for empty rows"
    return why_not_eager(a.x, a.weight, autocast=True, empty=True)


rms_norm.register("c", device="cpu", missing=MISSING, unsupported=why_not)(lambda a: NORM(a, "c"))
