"""The selective scan as a torch.library operator: autograd, fake tensors and gradients for whichever kernel serves.

A backend contributes a ScanKernel to KERNELS; everything that torch wants to know is written here, once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ssmzoo.ops.checks import compute_dtype
from ssmzoo.ops.dispatch import needs_grad, no_double_backward, unobserved


class ScanKernel(NamedTuple):
    """How one backend computes the scan. B, C are (e n), or (b g n l) with the same g for both.

    forward(u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx, delta_softplus, save)
        -> out (as u), last_state (b e n), saved (what the backward wants, or an empty tensor unless `save`)
    backward(dout, dlast_state or None, saved, u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx,
             delta_softplus)
        -> gradients of u, delta, A, B, C, D, z, delta_bias, initial_state, each of its argument's shape and dtype;
           an empty tensor for an argument that is None
    saved_shape(b, e, l, n) -> shape of `saved`
    """

    forward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, ...]]
    saved_shape: Callable[[int, int, int, int], tuple[int, ...]]


KERNELS: dict[str, ScanKernel] = {}

_ARGS = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, "
    "Tensor? initial_state, Tensor? seq_idx, bool delta_softplus"
)
_LIBRARY = torch.library.Library("ssmzoo", "FRAGMENT")
_LIBRARY.define(f"selective_scan({_ARGS}, bool save, str backend) -> (Tensor, Tensor, Tensor)")
_LIBRARY.define(
    f"selective_scan_backward(Tensor dout, Tensor? dlast_state, Tensor saved, {_ARGS}, str backend) -> ("
    + ", ".join(["Tensor"] * 9)
    + ")"
)


def scan_with(backend: str) -> Callable:
    """selective_scan_fn on the kernel registered under `backend`."""

    def run(
        u,
        delta,
        A,
        B,
        C,
        D=None,
        z=None,
        delta_bias=None,
        delta_softplus=False,
        return_last_state=False,
        *,
        initial_state=None,
        seq_idx=None,
    ):
        B, C = _same_groups(B, C)
        tensors = (u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx)
        save = needs_grad(*tensors)
        if not unobserved(*tensors):
            out, last_state, _ = torch.ops.ssmzoo.selective_scan(*tensors, delta_softplus, save, backend)
        elif save:
            out, last_state = _EagerScan.apply(*tensors, delta_softplus, backend)
        else:
            out, last_state, _ = KERNELS[backend].forward(*tensors, delta_softplus, False)
        return (out, last_state) if return_last_state else out

    return run


def _same_groups(B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """Time-dependent B, C as (b g n l) with one g; no copies."""
    B, C = (M.unsqueeze(1) if M.ndim == 3 else M for M in (B, C))
    if B.ndim == C.ndim == 4 and B.shape[1] != C.shape[1]:
        groups = max(B.shape[1], C.shape[1])
        B, C = (M.expand(-1, groups, -1, -1) for M in (B, C))
    return B, C


def _forward(*args):
    *args, backend = args
    return KERNELS[backend].forward(*args)


def _backward(*args):
    *args, backend = args
    return KERNELS[backend].backward(*args)


_LIBRARY.impl("selective_scan", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("selective_scan_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("ssmzoo::selective_scan", lib=_LIBRARY)
def _forward_fake(u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx, delta_softplus, save, backend):
    (b, e, l), n = u.shape, A.shape[1]
    dtype = compute_dtype(u, delta, A, B, C)
    saved = KERNELS[backend].saved_shape(b, e, l, n) if save else (0,)
    return torch.empty_like(u), u.new_empty(b, e, n, dtype=dtype), u.new_empty(saved, dtype=dtype)


@torch.library.register_fake("ssmzoo::selective_scan_backward", lib=_LIBRARY)
def _backward_fake(dout, dlast_state, saved, u, delta, A, B, C, D, z, delta_bias, initial_state, *rest):
    return tuple(empty_gradients(u, delta, A, B, C, D, z, delta_bias, initial_state))


def empty_gradients(u, delta, A, B, C, D, z, delta_bias, initial_state) -> list[Tensor]:
    """Uninitialised gradients: sequences in the layout of their arguments, B and C with states next to each other."""
    grads = [u.new_empty(0) if t is None else torch.empty_like(t) for t in (u, delta, z)]
    grads = [grads[0], grads[1], A, B, C, D, grads[2], delta_bias, initial_state]
    for i in (2, 3, 4, 5, 7, 8):
        t = grads[i]
        if t is not None and t.ndim == 4:
            b, g, n, l = t.shape
            grads[i] = t.new_empty(b, g, l, n).permute(0, 1, 3, 2)
        else:
            grads[i] = u.new_empty(0) if t is None else t.new_empty(t.shape)
    return grads


def _remember(ctx, saved: Tensor, tensors: tuple, options: tuple) -> None:
    ctx.save_for_backward(saved, *tensors)
    ctx.options = options  # delta_softplus, backend
    ctx.set_materialize_grads(False)


def _setup(ctx, inputs, output):
    *tensors, delta_softplus, _, backend = inputs
    _remember(ctx, output[2], tensors, (delta_softplus, backend))
    ctx.mark_non_differentiable(output[2])


def _gradients(ctx, dout, dlast_state, _=None):
    saved, *tensors = ctx.saved_tensors
    if dout is None and dlast_state is None:
        return (None,) * 13
    dout = torch.zeros_like(tensors[0]) if dout is None else dout
    if torch.is_grad_enabled() or not unobserved(dout, dlast_state, saved, *tensors):
        grads = torch.ops.ssmzoo.selective_scan_backward(dout, dlast_state, saved, *tensors, *ctx.options)
    else:
        grads = KERNELS[ctx.options[1]].backward(dout, dlast_state, saved, *tensors, ctx.options[0])
    grads = [None if t is None else g for g, t in zip(grads, tensors)]
    return (*grads, None, None, None, None)


class _EagerScan(torch.autograd.Function):
    """The same without torch's dispatcher, which takes longer than a small scan: 0.2 ms per training step, measured."""

    @staticmethod
    def forward(ctx, *arguments):
        *tensors, delta_softplus, backend = arguments
        out, last_state, saved = KERNELS[backend].forward(*tensors, delta_softplus, True)
        _remember(ctx, saved, tensors, (delta_softplus, backend))
        return out, last_state

    @staticmethod
    def backward(ctx, dout, dlast_state):
        return _gradients(ctx, dout, dlast_state)[:12]


torch.library.register_autograd("ssmzoo::selective_scan", _gradients, setup_context=_setup, lib=_LIBRARY)
torch.library.register_autograd(
    "ssmzoo::selective_scan_backward", no_double_backward("selective_scan", "reference"), lib=_LIBRARY
)
