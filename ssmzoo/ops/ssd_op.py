"""The scan of Mamba-2 as a torch.library operator: autograd, fake tensors and gradients for whichever kernel serves."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ssmzoo.ops.checks import compute_dtype
from ssmzoo.ops.dispatch import needs_grad, no_double_backward


class SSDKernel(NamedTuple):
    """How one backend computes S_t = exp(a_t) S_{t-1} + dt_t x_t (outer) B_t, y_t = S_t C_t + D x_t.

    forward(x, dt, a, B, C, D, initial_states, seq_idx, save) -> y (as x), last state (b h p n), saved (or empty)
    backward(dy, dlast, saved, x, dt, a, B, C, D, initial_states, seq_idx)
        -> gradients of x, dt, a, B, C, D, initial_states, each of its argument's shape and dtype; empty for None
    saved_shape(b, l, h, p, n) -> shape of `saved`
    x (b l h p); dt (b l h), D (h p), initial_states, seq_idx may be None; dlast may be None
    """

    forward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, ...]]
    saved_shape: Callable[[int, int, int, int, int], tuple[int, ...]]


KERNELS: dict[str, SSDKernel] = {}

_ARGS = "Tensor x, Tensor? dt, Tensor a, Tensor B, Tensor C, Tensor? D, Tensor? initial_states, Tensor? seq_idx"
_LIBRARY = torch.library.Library("ssmzoo", "FRAGMENT")
_LIBRARY.define(f"ssd({_ARGS}, bool save, str backend) -> (Tensor, Tensor, Tensor)")
_LIBRARY.define(
    f"ssd_backward(Tensor dy, Tensor? dlast, Tensor saved, {_ARGS}, str backend) -> (" + ", ".join(["Tensor"] * 7) + ")"
)
_LIBRARY.impl("ssd", lambda *args: KERNELS[args[-1]].forward(*args[:-1]), "CompositeExplicitAutograd")
_LIBRARY.impl("ssd_backward", lambda *args: KERNELS[args[-1]].backward(*args[:-1]), "CompositeExplicitAutograd")


def ssd_with(backend: str, x, dt, a, B, C, D=None, initial_states=None, seq_idx=None) -> tuple[Tensor, Tensor]:
    """y (b l h p) in x's dtype and the last state (b h p n), on the kernel registered under `backend`."""
    save = needs_grad(x, dt, a, B, C, D, initial_states)
    y, last, _ = torch.ops.ssmzoo.ssd(x, dt, a, B, C, D, initial_states, seq_idx, save, backend)
    return y, last


@torch.library.register_fake("ssmzoo::ssd", lib=_LIBRARY)
def _forward_fake(x, dt, a, B, C, D, initial_states, seq_idx, save, backend):
    (b, l, h, p), n = x.shape, B.shape[3]
    dtype = compute_dtype(x, a, B, C)
    saved = KERNELS[backend].saved_shape(b, l, h, p, n) if save else (0,)
    return x.new_empty(b, l, h, p), x.new_empty(b, h, p, n, dtype=dtype), x.new_empty(saved, dtype=dtype)


@torch.library.register_fake("ssmzoo::ssd_backward", lib=_LIBRARY)
def _backward_fake(dy, dlast, saved, x, dt, a, B, C, D, initial_states, seq_idx, backend):
    return tuple(x.new_empty(0) if t is None else t.new_empty(t.shape) for t in (x, dt, a, B, C, D, initial_states))


def _setup(ctx, inputs, output):
    *tensors, _, backend = inputs
    ctx.save_for_backward(output[2], *tensors)
    ctx.backend = backend
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])


def _gradients(ctx, dy, dlast, _):
    saved, *tensors = ctx.saved_tensors
    if dy is None and dlast is None:
        return (None,) * 10
    dy = torch.zeros_like(tensors[0]) if dy is None else dy
    grads = torch.ops.ssmzoo.ssd_backward(dy, dlast, saved, *tensors, ctx.backend)
    return (*(None if t is None else g for g, t in zip(grads, tensors)), None, None, None)


torch.library.register_autograd("ssmzoo::ssd", _gradients, setup_context=_setup, lib=_LIBRARY)
torch.library.register_autograd(
    "ssmzoo::ssd_backward", no_double_backward("the scan of Mamba-2", "reference"), lib=_LIBRARY
)
