"""When a kernel may be called directly, past torch's dispatcher, which takes longer than a small kernel runs."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmzoo.ops.transforms import transformed

PLAIN = (Tensor, torch.nn.Parameter)


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
    # Private: torch has no public question for an active TorchDispatchMode (fake tensors, proxies, flop counters).
    if torch._C._len_torch_dispatch_stack():
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
