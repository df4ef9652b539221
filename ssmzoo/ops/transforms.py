"""torch.func and forward-mode derivatives: when they are at work, and what PyTorch's own functions need then.

Kernels outside torch's functions have no rules for them: a torch.library operator drops the tangents of its arguments
without a word. So the dispatcher asks `transformed()` and takes forms that are composed of torch's functions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

functorch_transforms_active = torch._C._are_functorch_transforms_active  # see `transformed`


def transformed() -> bool:
    """Whether a transform of torch.func (vmap, grad, jvp ...) or a level of forward-mode differentiation is at work.

    Neither can be asked for in public: torch.func has no query, and `forward_ad` tells a level from one tensor at a
    time (unpack_dual), at ten times the cost.
    """
    return functorch_transforms_active() or forward_ad._current_level >= 0


def batched(*tensors: Tensor | None) -> bool:
    """Whether gradients come in batches, by torch.autograd.grad(is_grads_batched=True): as tensors without memory."""
    try:
        for t in tensors:
            if t is not None:
                t.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return True
    return False


def channels_last(x: Tensor) -> Tensor:
    """Maps (b c h w) with their channels next to each other in memory; as they are under torch.func, whose vmap has no
    rule for this layout."""
    return x if transformed() else x.contiguous(memory_format=torch.channels_last)


def scaled_dot_product_attention(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
    """torch's function of this name, by its composite form where the fused ones have no derivatives."""
    if not transformed():
        return F.scaled_dot_product_attention(q, k, v, **options)
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v, **options)
