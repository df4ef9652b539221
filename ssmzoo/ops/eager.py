"""When a kernel may be called directly, past torch's dispatcher, which takes longer than a small kernel runs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import has_torch_function

from ssmzoo.ops.transforms import functorch_transforms_active, transformed

PLAIN = (Tensor, torch.nn.Parameter)
# Private: torch has no public question for an active TorchDispatchMode (fake tensors, proxies, flop counters).
dispatch_modes = torch._C._len_torch_dispatch_stack


def static_facts(a: tuple) -> tuple | None:
    """What checks of arguments and the choice of a backend rest on, hashable: the modes at work; of every tensor of `a`
    shape, strides, dtype, device and requires_grad; every other argument as it is.

    None while anything compiles, traces, transforms or watches, and for tensors of a subclass or without memory: then
    nothing is remembered from one call to the next.
    """
    if (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or functorch_transforms_active()
        or forward_ad._current_level >= 0  # see `transformed`
        or dispatch_modes()
        or has_torch_function(a)
    ):
        return None
    # the strides of a contiguous tensor follow from its shape, and cost more to ask for
    facts = [torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")]
    for value in a:
        kind = type(value)
        if kind is Tensor or kind is torch.nn.Parameter:
            if value.is_meta:
                return None
            strides = value.is_contiguous() or value.stride()
            facts += (value.shape, strides, value.dtype, value.device, value.requires_grad)
        elif value is None or kind in (bool, int, float, str):
            facts += (kind, value)
        elif kind is tuple:
            for t in value:
                if type(t) not in PLAIN or t.is_meta:
                    return None
                facts += (t.shape, t.is_contiguous() or t.stride(), t.dtype, t.device, t.requires_grad)
        else:
            return None
    return tuple(facts)


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd will want the backward of a function of these tensors."""
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def eager(*tensors: Tensor | None) -> bool:
    """Whether nothing traces, transforms or wraps these tensors, so that their memory can be read at once."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or transformed():
        return False
    if dispatch_modes():
        return False
    for t in tensors:
        if t is not None and (type(t) not in PLAIN or t.is_meta):
            return False
    return True


def why_not_eager(*tensors: Tensor | None, autocast: bool = False, empty: bool = False) -> str | None:
    """The reason when a kernel that torch knows nothing of, in float32, must leave these tensors to the torch form.

    That form consists of torch's own functions: modes see them, torch.func transforms them, compilers fuse them.
    autocast: the operator is one that autocast runs in float32 anyway, so that the kernel may serve within it.
    empty: it serves empty tensors.
    """
    if not eager():
        return "is neither traced nor transformed: compilers fuse by themselves"
    if not autocast and torch.is_autocast_enabled("cpu"):
        return "leaves autocast to torch"
    if torch.overrides.has_torch_function(tensors):
        return "leaves tensor subclasses and modes to torch"
    for t in tensors:
        if t is not None:
            if t.dtype is not torch.float32:
                return f"computes in float32, got {str(t.dtype).removeprefix('torch.')}"
            if type(t) not in PLAIN:
                return f"leaves {type(t).__name__} to torch"
            if not empty and not t.numel():
                return "has nothing to do for empty tensors"
    return None
