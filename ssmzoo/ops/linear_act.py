"""A linear map with its bias and the activation behind it, in one pass over memory where oneDNN can do that.

Letters: d inputs, e outputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmzoo.ops.checks import expect_floats
from ssmzoo.ops.dispatch import needs_grad, op, unobserved, watched

ACTIVATIONS = {None: lambda x: x, "gelu": F.gelu, "relu": F.relu, "silu": F.silu}
ONEDNN = {None: ("none", ""), "gelu": ("gelu", "none"), "relu": ("relu", ""), "silu": ("swish", "")}  # gelu: exact
MISSING = None if hasattr(torch.ops.mkldnn, "_linear_pointwise") else "this torch has no oneDNN"


def check_linear_act(x, weight, bias=None, act=None) -> None:
    if act not in ACTIVATIONS:
        raise ValueError(f"act = {act!r}, expected one of {', '.join(map(repr, ACTIVATIONS))}")
    if weight.ndim != 2 or x.ndim < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}, expected (... d) and (e d)")
    expect_floats(x.device, x=x, weight=weight, bias=bias)


@op(check=check_linear_act)
def linear_act(x: Tensor, weight: Tensor, bias: Tensor | None = None, act: str | None = None) -> Tensor:
    """act(x W^T + bias): x (... d), weight (e d), bias (e), act None, "gelu" (exact), "relu" or "silu" -> (... e)

    The native backend is oneDNN's, in fp32; it gains most in inference, where the product is small beside its result.
    Raises ValueError for shapes that do not fit or an unknown activation.
    """
    y = (x.unsqueeze(-2) * weight).sum(-1)
    return ACTIVATIONS[act](y if bias is None else y + bias)


@linear_act.register("torch")
def linear_act_torch(x, weight, bias=None, act=None):
    return ACTIVATIONS[act](F.linear(x, weight, bias))


def _why_not(x, weight, bias=None, act=None):
    if any(t is not None and t.dtype != torch.float32 for t in (x, weight, bias)):
        return "computes in float32 only"
    if torch.is_autocast_enabled("cpu"):
        return "leaves autocast to torch"
    if not unobserved(x, weight, bias):
        return "is not traced: compilers fuse by themselves"
    if not (x.numel() and weight.numel()):
        return "has nothing to do for an empty matrix"
    return watched()


@linear_act.register("native", device="cpu", missing=MISSING, unsupported=_why_not)
def linear_act_onednn(x, weight, bias=None, act=None):
    if needs_grad(x, weight, bias):
        return ACTIVATIONS[act](_Linear.apply(x, weight, bias))
    return _onednn(x, weight, bias, act)


def _onednn(x, weight, bias, act=None):
    attribute, algorithm = ONEDNN[act]
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, attribute, [], algorithm)


class _Linear(torch.autograd.Function):
    """x W^T + bias with the gradients of its arguments; the one of W is a product that torch has as fast."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        ctx.biased = bias is not None
        return _onednn(x, weight, bias)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        rows = dy.reshape(-1, dy.shape[-1])
        dx = linear_act(dy, weight.t()) if ctx.needs_input_grad[0] else None
        dweight = rows.t() @ x.reshape(-1, x.shape[-1]) if ctx.needs_input_grad[1] else None
        return dx, dweight, rows.sum(0) if ctx.biased and ctx.needs_input_grad[2] else None
