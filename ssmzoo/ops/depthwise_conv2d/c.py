"""depthwise_conv2d on our compiled CPU kernels (depthwise_conv2d.c)."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from ssmzoo.ops.depthwise_conv2d import depthwise_conv2d
from ssmzoo.ops.depthwise_conv2d.torch import depthwise_conv2d_torch
from ssmzoo.ops.eager import why_not_eager
from ssmzoo.ops.library import Differentiable, Kernel
from ssmzoo.ops.native import VECTOR_LENGTH, commit, kernel, pack

FORWARD, MISSING = kernel("ssmzoo_depthwise_conv2d_forward")
BACKWARD, _ = kernel("ssmzoo_depthwise_conv2d_backward")
ACTIVATIONS = {None: 0, "silu": 1, "relu": 2}  # as in the C file
CACHE = 3 << 18  # bytes of rows that a task keeps at hand; whole rows are by far the fastest to pass over


def _call(function, a, results: list[Tensor | None]) -> None:
    b, h, w, d = a.x.shape
    threads, tiles = torch.get_num_threads(), -(-d // VECTOR_LENGTH)
    per_task = min(CACHE // (6 * (w + 2) * 4 * VECTOR_LENGTH), -(-tiles * b // threads), tiles)
    sizes = b, h, w, d, a.stride, ACTIVATIONS[a.act], a.rectify, max(1, per_task), threads
    taps = a.weight.flatten(1).t().clone(memory_format=torch.contiguous_format)  # (9 d)
    if a.residual:
        taps[4] += 1  # one more in the centre
    function(pack([a.x, taps, a.bias, *results], *sizes))


def forward(a, save: bool):
    b, h, w, d = a.x.shape
    y = a.x.new_empty(b, (h - 1) // a.stride + 1, (w - 1) // a.stride + 1, d)
    commit(y)
    _call(FORWARD, a, [y, None, None, None])
    return (y,), None


def backward(a, saved: None, dy: Tensor) -> dict[str, Tensor]:
    dy = dy if dy.stride(-1) == 1 else dy.contiguous()
    dx, sums = a.x.new_empty(a.x.shape), a.x.new_empty(a.x.shape[0], 10, a.x.shape[3])  # taps and bias
    commit(dx)
    _call(BACKWARD, a, [None, dy, dx, sums])
    sums = sums.sum(0)
    grads = {"x": dx, "weight": sums[:9].t().reshape(a.weight.shape)}
    return grads if a.bias is None else grads | {"bias": sums[9]}


CONVOLUTION = Differentiable("depthwise_conv2d", depthwise_conv2d.Arguments, twice=depthwise_conv2d_torch)
CONVOLUTION.kernels["c"] = Kernel(forward, backward)


def why_not(a) -> str | None:
    if a.weight.shape[-1] != 3:
        return f"has kernels of 3x3 only, got {a.weight.shape[-1]}x{a.weight.shape[-1]}"
    if a.act not in ACTIVATIONS:
        return f"has no {a.act}"
    return why_not_eager(a.x, a.weight, a.bias)


def _convolve(convolution: Callable, a: tuple) -> Tensor:
    return convolution(a if a.x.stride(-1) == 1 else a._replace(x=a.x.contiguous()))


EAGERLY = functools.partial(_convolve, functools.partial(CONVOLUTION.eager, "c"))
depthwise_conv2d.register("c", device="cpu", missing=MISSING, unsupported=why_not, eager=EAGERLY)(
    functools.partial(_convolve, lambda a: CONVOLUTION(a, "c"))
)
