"""rms_norm on our compiled CPU kernels (rms_norm.c); torch composes it of eight passes over memory."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from ssmzoo.ops.dispatch import needs_grad, no_double_backward, unobserved, watched
from ssmzoo.ops.native import commit, kernel
from ssmzoo.ops.rms_norm import rms_norm

FORWARD, MISSING = kernel("ssmzoo_rms_norm")
BACKWARD, _ = kernel("ssmzoo_rms_norm_backward")
ROWS = 64  # per task

_LIBRARY = torch.library.Library("ssmzoo", "FRAGMENT")
_LIBRARY.define("rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)")
_LIBRARY.define("rms_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor scale, float eps) -> (Tensor, Tensor)")


def _call(
    function,
    x: Tensor,
    weight: Tensor,
    dy: Tensor | None,
    y: Tensor | None,
    scale: Tensor | None,
    dx: Tensor | None,
    dweight: Tensor | None,
    eps: float,
) -> None:
    pointers = (0 if t is None else t.data_ptr() for t in (x, weight, dy, y, scale, dx, dweight))
    dim = x.shape[-1]
    function(struct.pack("11qd", *pointers, x.numel() // dim, dim, ROWS, torch.get_num_threads(), eps))


def _forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y (... d) and the scale of each row, 1 / sqrt(mean(x^2) + eps) (...)"""
    x, weight = x.contiguous(), weight.contiguous()
    y, scale = torch.empty_like(x), x.new_empty(x.shape[:-1])
    commit(y)
    _call(FORWARD, x, weight, None, y, scale, None, None, eps)
    return y, scale


def _backward(dy: Tensor, x: Tensor, weight: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    dy, x, weight = dy.contiguous(), x.contiguous(), weight.contiguous()
    dx, parts = torch.empty_like(x), x.new_empty(-(-scale.numel() // ROWS), x.shape[-1])
    commit(dx)
    _call(BACKWARD, x, weight, dy, None, scale, dx, parts, eps)
    return dx, parts.sum(0)


_LIBRARY.impl("rms_norm", _forward, "CPU")
_LIBRARY.impl("rms_norm_backward", _backward, "CPU")
torch.library.register_fake(
    "ssmzoo::rms_norm", lambda x, weight, eps: (x.new_empty(x.shape), x.new_empty(x.shape[:-1])), lib=_LIBRARY
)
torch.library.register_fake(
    "ssmzoo::rms_norm_backward",
    lambda dy, x, weight, scale, eps: (x.new_empty(x.shape), weight.new_empty(weight.shape)),
    lib=_LIBRARY,
)


def _setup(ctx, inputs, output):
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx, dy, _):
    return *torch.ops.ssmzoo.rms_norm_backward(dy, *ctx.saved_tensors, ctx.eps), None


torch.library.register_autograd("ssmzoo::rms_norm", _gradients, setup_context=_setup, lib=_LIBRARY)
torch.library.register_autograd("ssmzoo::rms_norm_backward", no_double_backward("rms_norm"), lib=_LIBRARY)


def why_not(x: Tensor, weight: Tensor, eps: float = 1e-5) -> str | None:
    if x.dtype is not torch.float32 or weight.dtype is not torch.float32:
        return f"computes in float32, got {x.dtype} and {weight.dtype}"
    if not x.shape[-1]:
        return "has nothing to do for empty rows"
    return watched()


@rms_norm.register("native", device="cpu", missing=MISSING, unsupported=why_not)
def rms_norm_native(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    if needs_grad(x, weight) or not unobserved(x, weight) or not (x.is_contiguous() and weight.is_contiguous()):
        return torch.ops.ssmzoo.rms_norm(x, weight, eps)[0]
    y = torch.empty_like(x)
    _call(FORWARD, x, weight, None, y, None, None, None, eps)
    return y
