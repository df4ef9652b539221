"""linear_act on a CPU: oneDNN's products with the activation behind them, and our kernels (linear_act.c) for training.

Torch takes three further passes over memory for a linear map with an activation: one forwards, two backwards.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from ssmzoo.ops.dispatch import gradients_by, needs_grad
from ssmzoo.ops.linear_act import linear_act, linear_act_torch
from ssmzoo.ops.native import VECTOR_LENGTH, kernel, why_not_eager

FORWARD, MISSING = kernel("ssmzoo_act")
BACKWARD, _ = kernel("ssmzoo_linear_backward")
if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
    MISSING = "this torch has no oneDNN"
CODES = {None: 0, "gelu": 1, "relu": 2, "silu": 3}
ONEDNN = {None: ("none", ""), "gelu": ("gelu", "none"), "relu": ("relu", ""), "silu": ("swish", "")}  # gelu: exact
ROWS = 1024  # at least, for a thread of its own; fewer rows are shared by columns


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None, act: str | None = None) -> Tensor:
    attribute, algorithm = ONEDNN[act]
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, attribute, [], algorithm)


def _act(h: Tensor, act: str) -> Tensor:
    y = torch.empty_like(h)
    FORWARD(struct.pack("5q", h.data_ptr(), y.data_ptr(), h.numel(), CODES[act], torch.get_num_threads()))
    return y


def _backward(dy: Tensor, saved: Tensor | None, x: Tensor, act: str | None):
    """dy, saved (rows e), x (rows d), contiguous -> gradients before the activation (rows e), of weight and bias"""
    (rows, e), d, threads = dy.shape, x.shape[1], torch.get_num_threads()
    parts = max(1, min(threads, rows // ROWS))
    columns = -(-e // -(-threads // parts) // VECTOR_LENGTH) * VECTOR_LENGTH
    dh = dy if act is None else torch.empty_like(dy)
    dweight = dy.new_empty(parts, e, d) if d % VECTOR_LENGTH == 0 else None
    dbias = dy.new_empty(parts, e)
    pointers = (0 if t is None else t.data_ptr() for t in (dy, saved, x, dh, dweight, dbias))
    BACKWARD(struct.pack("13q", *pointers, rows, e, d, CODES[act], parts, columns, threads))
    return dh, dh.t() @ x if dweight is None else _total(dweight), _total(dbias)


def _total(parts: Tensor) -> Tensor:
    return parts.sum(0) if len(parts) > 1 else parts[0]


class _LinearAct(torch.autograd.Function):
    """act(x W^T + bias) with the gradients of its arguments."""

    @staticmethod
    def forward(ctx, x, weight, bias, act):
        if act in (None, "relu"):
            y = _onednn(x, weight, bias, act)
            saved = None if act is None else y
        else:
            saved = _onednn(x, weight, bias)
            y = _act(saved, act)
        ctx.save_for_backward(x, weight, bias, saved)
        ctx.act = act
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, bias, saved = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        if torch.is_grad_enabled():  # gradients of the gradients are wanted
            return gradients_by(lambda *t: linear_act_torch(*t, ctx.act), (x, weight, bias), wanted, dy)
        flat = [None if t is None else t.reshape(-1, t.shape[-1]).contiguous() for t in (dy, saved, x)]
        dh, dweight, dbias = _backward(*flat, ctx.act)
        dx = _onednn(dh, weight.t(), None).view_as(x) if wanted[0] else None
        return dx, dweight if wanted[1] else None, dbias if bias is not None and wanted[2] else None, None


def _why_not(x, weight, bias=None, act=None):
    return why_not_eager(x, weight, bias)


@linear_act.register("native", device="cpu", missing=MISSING, unsupported=_why_not)
def linear_act_native(x, weight, bias=None, act=None):
    return _LinearAct.apply(x, weight, bias, act) if needs_grad(x, weight, bias) else _onednn(x, weight, bias, act)
