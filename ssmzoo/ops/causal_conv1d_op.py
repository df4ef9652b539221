"""The causal convolution as a torch.library operator, for the backends that are not compiled into torch's own keys.

A backend contributes a ConvKernel to KERNELS; everything that torch wants to know is written here, once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ssmzoo.ops.dispatch import no_double_backward


class ConvKernel(NamedTuple):
    """How one backend convolves.

    forward(x, weight, bias, seq_idx, initial_states, silu) -> out (as x)
    backward(dout, x, weight, bias, seq_idx, initial_states, silu)
        -> gradients of x, weight, bias, initial_states, each of its argument's shape and dtype; empty for None
    """

    forward: Callable[..., Tensor]
    backward: Callable[..., tuple[Tensor, ...]]


KERNELS: dict[str, ConvKernel] = {}

_ARGS = "Tensor x, Tensor weight, Tensor? bias, Tensor? seq_idx, Tensor? initial_states, bool silu, str backend"
_LIBRARY = torch.library.Library("ssmzoo", "FRAGMENT")
_LIBRARY.define(f"causal_conv1d_with({_ARGS}) -> Tensor")
_LIBRARY.define(f"causal_conv1d_with_backward(Tensor dout, {_ARGS}) -> (Tensor, Tensor, Tensor, Tensor)")
_LIBRARY.impl("causal_conv1d_with", lambda *args: KERNELS[args[-1]].forward(*args[:-1]), "CompositeExplicitAutograd")
_LIBRARY.impl(
    "causal_conv1d_with_backward", lambda *args: KERNELS[args[-1]].backward(*args[:-1]), "CompositeExplicitAutograd"
)
torch.library.register_fake("ssmzoo::causal_conv1d_with", lambda x, *_: torch.empty_like(x), lib=_LIBRARY)


def empty_gradients(x: Tensor, weight: Tensor, bias: Tensor | None, initial_states: Tensor | None) -> list[Tensor]:
    rest = (weight, bias, initial_states)
    return [torch.empty_like(x), *(x.new_empty(0) if t is None else t.new_empty(t.shape) for t in rest)]


@torch.library.register_fake("ssmzoo::causal_conv1d_with_backward", lib=_LIBRARY)
def _backward_fake(dout, x, weight, bias, seq_idx, initial_states, silu, backend):
    return tuple(empty_gradients(x, weight, bias, initial_states))


def _setup(ctx, inputs, output):
    *tensors, silu, backend = inputs
    ctx.save_for_backward(*tensors)
    ctx.options = silu, backend


def _gradients(ctx, dout):
    saved = ctx.saved_tensors  # read once: gradient checkpointing recomputes them for one reading only
    dx, dw, db, di = torch.ops.ssmzoo.causal_conv1d_with_backward(dout, *saved, *ctx.options)
    return dx, dw, None if saved[2] is None else db, None, None if saved[4] is None else di, None, None


torch.library.register_autograd("ssmzoo::causal_conv1d_with", _gradients, setup_context=_setup, lib=_LIBRARY)
torch.library.register_autograd(
    "ssmzoo::causal_conv1d_with_backward", no_double_backward("causal_conv1d"), lib=_LIBRARY
)
