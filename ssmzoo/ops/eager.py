"""When a kernel may be called directly, past torch's dispatcher, which takes longer than a small kernel runs."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmzoo.ops.transforms import transformed

PLAIN = (Tensor, torch.nn.Parameter)


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd will want the backward of a function of these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def eager(*tensors: Tensor | None) -> bool:
    """Whether nothing traces, transforms or wraps these tensors, so that their memory can be read at once."""
    if torch.compiler.is_compiling() or transformed():
        return False
    # Private: torch has no public question for an active TorchDispatchMode (fake tensors, proxies, flop counters).
    if torch._C._len_torch_dispatch_stack():
        return False
    return all(t is None or (type(t) in PLAIN and not t.is_meta) for t in tensors)


def why_not_eager(*tensors: Tensor | None, autocast: bool = False, empty: bool = False) -> str | None:
    """The reason when a kernel that torch knows nothing of, in float32, must leave these tensors to the torch form.

    That form consists of torch's own functions: modes see them, torch.func transforms them, compilers fuse them.
    autocast: the operator is one that autocast runs in float32 anyway, so that the kernel may serve within it.
    empty: it serves empty tensors.
    """
    if torch.compiler.is_compiling():
        return "is not traced: compilers fuse by themselves"
    for t in tensors:
        if t is not None and t.dtype is not torch.float32:
            return f"computes in float32, got {str(t.dtype).removeprefix('torch.')}"
        if t is not None and not empty and not t.numel():
            return "has nothing to do for empty tensors"
    if not autocast and torch.is_autocast_enabled("cpu"):
        return "leaves autocast to torch"
    if torch.overrides.has_torch_function(tensors) or not eager(*tensors):
        return "leaves tensor subclasses, modes and torch.func to torch"
    return None
