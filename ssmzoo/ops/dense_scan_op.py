"""The dense scan as torch.library operators: autograd and fake tensors for whichever kernel serves.

Two operators, one for transitions given per symbol and one for mixtures that differ at every step; a backend
contributes a DenseKernel to KERNELS.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ssmzoo.ops.dispatch import no_double_backward


class DenseKernel(NamedTuple):
    """How one backend computes the scan; signatures as in ssmzoo.ops.dense_scan_torch. All tensors are contiguous and
    of one dtype; d_states and d_last are zeros where the loss does not depend on them."""

    symbols_forward: Callable[..., tuple[Tensor, Tensor]]
    symbols_backward: Callable[..., tuple[Tensor, ...]]
    mixture_forward: Callable[..., tuple[Tensor, Tensor]]
    mixture_backward: Callable[..., tuple[Tensor, ...]]


KERNELS: dict[str, DenseKernel] = {}

_LIBRARY = torch.library.Library("ssmzoo", "FRAGMENT")
_SYMBOLS, _MIXTURE = "Tensor T", "Tensor A_dict, Tensor weights"
_GRADIENTS = "Tensor states, Tensor codes, Tensor h0, Tensor? d_states, Tensor d_last"
_LIBRARY.define(
    f"dense_scan_symbols({_SYMBOLS}, Tensor x, Tensor codes, Tensor h0, bool keep, bool parallel, "
    "str backend) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    f"dense_scan_symbols_backward({_SYMBOLS}, {_GRADIENTS}, bool parallel, str backend) -> (Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    f"dense_scan_mixture({_MIXTURE}, Tensor x, Tensor codes, Tensor h0, float p_norm, bool keep, "
    "bool parallel, str backend) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    f"dense_scan_mixture_backward({_MIXTURE}, {_GRADIENTS}, float p_norm, bool parallel, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)


def _serve(name: str) -> Callable:
    def run(*args):
        *args, backend = args
        with torch.autocast(args[0].device.type, enabled=False):
            return getattr(KERNELS[backend], name)(*args)

    return run


for _name in ("symbols", "mixture"):
    _LIBRARY.impl(f"dense_scan_{_name}", _serve(f"{_name}_forward"), "CompositeExplicitAutograd")
    _LIBRARY.impl(f"dense_scan_{_name}_backward", _serve(f"{_name}_backward"), "CompositeExplicitAutograd")


def _states_fake(x, keep):
    b, l, n = x.shape
    return x.new_empty(b, l if keep else 0, n), x.new_empty(b, n)


@torch.library.register_fake("ssmzoo::dense_scan_symbols", lib=_LIBRARY)
def _symbols_fake(T, x, codes, h0, keep, parallel, backend):
    return _states_fake(x, keep)


@torch.library.register_fake("ssmzoo::dense_scan_mixture", lib=_LIBRARY)
def _mixture_fake(A_dict, weights, x, codes, h0, p_norm, keep, parallel, backend):
    return _states_fake(x, keep)


@torch.library.register_fake("ssmzoo::dense_scan_symbols_backward", lib=_LIBRARY)
def _symbols_backward_fake(T, states, codes, h0, *rest):
    return torch.empty_like(T), torch.empty_like(states), torch.empty_like(h0)


@torch.library.register_fake("ssmzoo::dense_scan_mixture_backward", lib=_LIBRARY)
def _mixture_backward_fake(A_dict, weights, states, codes, h0, *rest):
    return torch.empty_like(A_dict), torch.empty_like(weights), torch.empty_like(states), torch.empty_like(h0)


def _setup(transitions: int):
    """Save the tensors that say what the transitions are (their number is given), the states, the codes and h0."""

    def setup(ctx, inputs, output):
        _, codes, h0, *rest = inputs[transitions:]
        ctx.save_for_backward(*inputs[:transitions], output[0], codes, h0)
        *options, _, parallel, backend = rest
        ctx.options = (*options, parallel, backend)
        ctx.set_materialize_grads(False)

    return setup


def _gradients(name: str, transitions: int, others: int):
    """The backward of an operator with so many transition tensors and so many arguments after h0."""

    def backward(ctx, d_states, d_last):
        *given, states, codes, h0 = ctx.saved_tensors
        if d_states is None and d_last is None:
            return (None,) * (transitions + 3 + others)
        d_states = None if d_states is None else d_states.contiguous()
        d_last = torch.zeros_like(h0) if d_last is None else d_last.contiguous()
        function = getattr(torch.ops.ssmzoo, name)
        *d_given, dx, d_h0 = function(*given, states, codes, h0, d_states, d_last, *ctx.options)
        return (*d_given, dx, None, d_h0, *(None,) * others)

    return backward


for _name, _transitions, _others in (("symbols", 1, 3), ("mixture", 2, 4)):
    torch.library.register_autograd(
        f"ssmzoo::dense_scan_{_name}",
        _gradients(f"dense_scan_{_name}_backward", _transitions, _others),
        setup_context=_setup(_transitions),
        lib=_LIBRARY,
    )
    torch.library.register_autograd(
        f"ssmzoo::dense_scan_{_name}_backward", no_double_backward("dense_scan", "reference"), lib=_LIBRARY
    )
