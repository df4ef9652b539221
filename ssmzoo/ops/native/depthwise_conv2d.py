"""depthwise_conv2d on our compiled CPU kernels (depthwise_conv2d.c)."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmzoo.ops.depthwise_conv2d import depthwise_conv2d, depthwise_conv2d_torch
from ssmzoo.ops.dispatch import gradients_by, needs_grad
from ssmzoo.ops.native import VECTOR_LENGTH, commit, kernel, pack, why_not_eager

FORWARD, MISSING = kernel("ssmzoo_depthwise_conv2d_forward")
BACKWARD, _ = kernel("ssmzoo_depthwise_conv2d_backward")
ACTIVATIONS = {None: 0, "silu": 1, "relu": 2}  # as in the C file
CACHE = 3 << 18  # bytes of rows that a task keeps at hand; whole rows are by far the fastest to pass over


def _call(function, tensors: list[Tensor | None], x: Tensor, act: str | None, stride: int, rectify: bool) -> None:
    b, h, w, d = x.shape
    threads, tiles = torch.get_num_threads(), -(-d // VECTOR_LENGTH)
    per_task = min(CACHE // (6 * (w + 2) * 4 * VECTOR_LENGTH), -(-tiles * b // threads), tiles)
    function(pack(tensors, b, h, w, d, stride, ACTIVATIONS[act], rectify, max(1, per_task), threads))


def _taps(weight: Tensor, residual: bool) -> Tensor:
    """(d 1 3 3) -> (9 d); a residual is one more in the centre."""
    taps = weight.flatten(1).t().clone(memory_format=torch.contiguous_format)
    if residual:
        taps[4] += 1
    return taps


def _forward(x, weight, bias, act, stride, residual, rectify):
    b, h, w, d = x.shape
    y = x.new_empty(b, (h - 1) // stride + 1, (w - 1) // stride + 1, d)
    commit(y)
    _call(FORWARD, [x, _taps(weight, residual), bias, y, None, None, None], x, act, stride, rectify)
    return y


class _DepthwiseConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, *options):
        ctx.save_for_backward(x, weight, bias)
        ctx.options = options
        return _forward(x, weight, bias, *options)

    @staticmethod
    def backward(ctx, dy):
        x, weight, bias = ctx.saved_tensors
        if torch.is_grad_enabled():  # gradients of the gradients are wanted
            return gradients_by(
                lambda *t: depthwise_conv2d_torch(*t, *ctx.options), (x, weight, bias), ctx.needs_input_grad, dy
            )
        act, stride, residual, rectify = ctx.options
        dy = dy if dy.stride(-1) == 1 else dy.contiguous()
        dx, sums = x.new_empty(x.shape), x.new_empty(x.shape[0], 10, x.shape[3])  # taps and bias
        commit(dx)
        _call(BACKWARD, [x, _taps(weight, residual), bias, None, dy, dx, sums], x, act, stride, rectify)
        sums = sums.sum(0)
        dbias = None if bias is None else sums[9]
        return dx, sums[:9].t().reshape(weight.shape), dbias, *[None] * 4


def _why_not(x, weight, bias=None, act=None, stride=1, residual=False, rectify=False):
    if weight.shape[-1] != 3:
        return f"has kernels of 3x3 only, got {weight.shape[-1]}x{weight.shape[-1]}"
    if act not in ACTIVATIONS:
        return f"has no {act}"
    return why_not_eager(x, weight, bias)


@depthwise_conv2d.register("native", device="cpu", missing=MISSING, unsupported=_why_not)
def depthwise_conv2d_native(x, weight, bias=None, act=None, stride=1, residual=False, rectify=False):
    x = x if x.stride(-1) == 1 else x.contiguous()
    call = _DepthwiseConv.apply if needs_grad(x, weight, bias) else _forward
    return call(x, weight, bias, act, stride, residual, rectify)
