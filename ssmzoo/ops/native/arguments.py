"""Arguments in the forms that several compiled kernels read."""

from __future__ import annotations

from torch import Tensor

from ssmzoo.ops.checks import resets


def in_rows(t: Tensor) -> Tensor:
    """float32 with neighbouring elements along the last axis; other strides are taken as they are."""
    t = t.float()
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def whole(t: Tensor | None) -> Tensor | None:
    """float32 and contiguous, or None"""
    return None if t is None else t.float().contiguous()


def decays(log_decay: Tensor, seq_idx: Tensor | None) -> Tensor:
    """exp(log_decay), (b l ...), float32 and contiguous; 0 where a document begins (seq_idx, (b l))."""
    e = log_decay.float().exp()
    if seq_idx is not None:
        e = e.masked_fill(resets(seq_idx).reshape(*seq_idx.shape, *[1] * (e.ndim - 2)), 0)
    return e.contiguous()
