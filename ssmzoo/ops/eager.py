"""When a kernel may be called directly, past torch's dispatcher, which takes longer than a small kernel runs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import has_torch_function

from ssmzoo.ops.transforms import functorch_transforms_active, transformed

PARAMETER = torch.nn.Parameter
PLAIN = (Tensor, PARAMETER)
NO_MEMORY = torch.device("meta")
PLAIN_VALUES = (bool, int, float, str, torch.dtype)
# Private: torch has no public question for an active TorchDispatchMode (fake tensors, proxies, flop counters).
dispatch_modes = torch._C._len_torch_dispatch_stack


def static_facts(a: tuple) -> tuple | None:
    """What checks of arguments and the choice of a backend rest on, hashable: the modes at work; of every tensor of `a`
    shape, strides, dtype, device (unless it is the CPU) and requires_grad; every other argument as it is.

    None while anything compiles, traces, transforms or watches, and for tensors of a subclass or `negated`: then
    nothing is remembered from one call to the next, nor where NO_MEMORY is among the facts.
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
    facts = [torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")]
    for value in a:
        kind = type(value)
        if kind is Tensor or kind is PARAMETER:
            if value.is_neg():
                return None
            # strides cost more to ask for, and follow from the shape of a contiguous tensor (where a side is 1, no CPU
            # kernel uses its stride)
            if value.is_cpu:
                facts += (value.shape, value.is_contiguous() or value.stride(), value.dtype, value.requires_grad)
            else:
                facts += (value.shape, value.stride(), value.dtype, value.device, value.requires_grad)
        elif value is None:
            facts.append(None)
        elif kind in PLAIN_VALUES:
            facts += (kind, value)
        elif kind is tuple:
            facts += (kind, len(value))
            for t in value:
                if type(t) in PLAIN and not t.is_neg():
                    strides = (t.is_cpu and t.is_contiguous()) or t.stride()
                    facts += (t.shape, strides, t.dtype, t.device, t.requires_grad)
                elif type(t) in PLAIN_VALUES:
                    facts += (type(t), t)
                else:
                    return None
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


def negated(a: tuple) -> bool:
    """Whether a tensor among arguments is a view of memory that holds the opposite numbers, as the imaginary part of a
    conjugate is: torch's functions read it right, kernels that take its address do not."""
    if torch.compiler.is_compiling():
        return False
    tensors = [t for value in a for t in (value if type(value) is tuple else (value,)) if isinstance(t, Tensor)]
    return any(t.is_neg() for t in tensors)


def eager(*tensors: Tensor | None) -> bool:
    """Whether nothing traces, transforms, wraps or negates these tensors, so that their memory can be read at once."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or transformed():
        return False
    if dispatch_modes():
        return False
    for t in tensors:
        if t is not None and (type(t) not in PLAIN or t.is_meta or t.is_neg()):
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
