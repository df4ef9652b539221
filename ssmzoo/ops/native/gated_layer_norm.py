"""gated_layer_norm on our compiled CPU kernels (gated_layer_norm.c): one pass over memory each way.

Torch takes three forwards, and keeps two results more for its gradients.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from ssmzoo.ops.dispatch import gradients_by
from ssmzoo.ops.gated_layer_norm import gated_layer_norm, gated_layer_norm_torch
from ssmzoo.ops.native import commit, kernel, why_not_eager

FORWARD, MISSING = kernel("ssmzoo_gated_layer_norm")
BACKWARD, _ = kernel("ssmzoo_gated_layer_norm_backward")
ROWS = 64  # per task


def _rows(x: Tensor) -> Tensor:
    """(... d) -> (rows d), the rows apart as they may be"""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def _call(function, x: Tensor, z: Tensor, weight: Tensor, bias: Tensor, eps: float, more: list[Tensor | None]) -> None:
    given = [x.contiguous(), _rows(z), weight.contiguous(), bias.contiguous(), *more]
    pointers = (0 if t is None else t.data_ptr() for t in given)
    d = x.shape[-1]
    function(struct.pack("16qd", *pointers, given[1].stride(0), x.numel() // d, d, ROWS, torch.get_num_threads(), eps))


class _GatedLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, z, weight, bias, eps):
        y, mean, scale = x.new_empty(x.shape), x.new_empty(x.shape[:-1]), x.new_empty(x.shape[:-1])
        commit(y)
        _call(FORWARD, x, z, weight, bias, eps, [None, y, mean, scale, None, None, None])
        ctx.save_for_backward(x, z, weight, bias, mean, scale)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx, dy):
        *given, mean, scale = ctx.saved_tensors
        if torch.is_grad_enabled():  # gradients of the gradients are wanted
            return gradients_by(lambda *t: gated_layer_norm_torch(*t, ctx.eps), given, ctx.needs_input_grad, dy)
        dy = dy.contiguous()
        dx, dz = torch.empty_like(dy), torch.empty_like(dy)
        sums = dy.new_empty(-(-mean.numel() // ROWS), 2, dy.shape[-1])
        commit(dx, dz)
        _call(BACKWARD, *given, ctx.eps, [dy, None, mean, scale, dx, dz, sums])
        return dx, dz, *sums.sum(0), None


def _why_not(x, z, weight, bias, eps=1e-5):
    return why_not_eager(x, z, weight, bias)


@gated_layer_norm.register("native", device="cpu", missing=MISSING, unsupported=_why_not)
def gated_layer_norm_native(x, z, weight, bias, eps=1e-5):
    return _GatedLayerNorm.apply(x, z, weight, bias, eps)
