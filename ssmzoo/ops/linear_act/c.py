"""linear_act on a CPU: oneDNN's products with the activation behind them, and our kernels (linear_act.c) for training.

Torch takes three further passes over memory for a linear map with an activation: one forwards, two backwards.
"""

from __future__ import annotations

import functools
import struct

import torch
from torch import Tensor

from ssmzoo.ops.dispatch import wanted_backend
from ssmzoo.ops.eager import needs_grad, why_not_eager
from ssmzoo.ops.library import Differentiable, Kernel
from ssmzoo.ops.linear_act import linear_act
from ssmzoo.ops.linear_act.torch import linear_act_torch
from ssmzoo.ops.native import VECTOR_LENGTH, kernel
from ssmzoo.ops.native.multiply import multiply, packed

FORWARD, MISSING = kernel("ssmzoo_act")
BACKWARD, _ = kernel("ssmzoo_linear_backward")
# Private: the only product of torch with an activation behind it; torch.compile uses it for the same purpose.
POINTWISE = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
if POINTWISE is None:
    MISSING = "this torch has no oneDNN"
CODES = {None: 0, "gelu": 1, "relu": 2, "silu": 3}
ONEDNN = {None: ("none", ""), "gelu": ("gelu", "none"), "relu": ("relu", ""), "silu": ("swish", "")}  # gelu: exact
SMALL = 1 << 22  # multiply-adds; below, torch's product and activation are done sooner
FEW = 8  # tokens: their product is bound by reading the matrix, and reads it faster than oneDNN's
ROWS = 1024  # at least, for a thread of its own; fewer rows are shared by columns


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None, act: str | None = None) -> Tensor:
    attribute, algorithm = ONEDNN[act]
    return POINTWISE(x, weight, bias, attribute, [], algorithm)


def _act(h: Tensor, act: str) -> Tensor:
    y = torch.empty_like(h)
    FORWARD(struct.pack("5q", h.data_ptr(), y.data_ptr(), h.numel(), CODES[act], torch.get_num_threads()))
    return y


def forward(a, save: bool):
    """What the slope of the activation is found from is kept: y of a ReLU, otherwise what goes in."""
    if not save and a.act is None and a.x.numel() <= FEW * a.x.shape[-1] and a.weight.is_contiguous():
        return (multiply(a.x.contiguous(), packed(a.weight, a.bias)),), None
    if not save or a.act in (None, "relu"):
        attribute, algorithm = ONEDNN[a.act]
        y = POINTWISE(a.x, a.weight, a.bias, attribute, [], algorithm)
        return (y,), y if a.act is not None and save else None
    h = _onednn(a.x, a.weight, a.bias)
    return (_act(h, a.act),), h


def backward(a, saved: Tensor | None, dy: Tensor) -> dict[str, Tensor]:
    flat = [None if t is None else t.reshape(-1, t.shape[-1]).contiguous() for t in (dy, saved, a.x)]
    dh, dweight, dbias = _parameters(*flat, a.act)
    grads = {"weight": dweight} if a.bias is None else {"weight": dweight, "bias": dbias}
    if a.x.requires_grad:
        grads["x"] = _onednn(dh, a.weight.t(), None).view_as(a.x)
    return grads


def _parameters(dy: Tensor, saved: Tensor | None, x: Tensor, act: str | None):
    """dy, saved (rows e), x (rows d), contiguous -> gradients before the activation (rows e), of weight and bias"""
    (rows, e), d, threads = dy.shape, x.shape[1], torch.get_num_threads()
    parts = max(1, min(threads, rows // ROWS))
    columns = -(-e // -(-threads // parts) // VECTOR_LENGTH) * VECTOR_LENGTH
    dh = dy if act is None else torch.empty_like(dy)
    dweight, dbias = dy.new_empty(parts, e, d), dy.new_empty(parts, e)
    pointers = (0 if t is None else t.data_ptr() for t in (dy, saved, x, dh, dweight, dbias))
    BACKWARD(struct.pack("13q", *pointers, rows, e, d, CODES[act], parts, columns, threads))
    return dh, _total(dweight), _total(dbias)


def _total(parts: Tensor) -> Tensor:
    return parts.sum(0) if len(parts) > 1 else parts[0]


LINEAR = Differentiable("linear_act", linear_act.Arguments, saved="h", twice=linear_act_torch)
LINEAR.kernels["c"] = Kernel(forward, backward)


def _is_few(a) -> bool:
    """Whether a call is one of our own kernel's: vectors of a token, without an activation or a gradient."""
    few = a.act is None and a.x.numel() <= FEW * a.x.shape[-1] and a.weight.is_contiguous()
    return few and not needs_grad(a.x, a.weight, a.bias)


def why_not(a) -> str | None:
    # compiled programs may be for every size: a comparison would bind them to this one
    free = not torch.compiler.is_compiling() and wanted_backend() is None
    if free and not _is_few(a) and a.x.shape[:-1].numel() * a.weight.numel() < SMALL:
        return "leaves small products to torch, whose call takes a fraction of oneDNN's, unless asked for by name"
    return why_not_eager(a.x, a.weight, a.bias)


EAGERLY = functools.partial(LINEAR.eager, "c")
linear_act.register("c", device="cpu", missing=MISSING, unsupported=why_not, eager=EAGERLY)(lambda a: LINEAR(a, "c"))
