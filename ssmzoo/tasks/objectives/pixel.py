"""Pixel losses of image restoration, means over all elements; images in [0, 1]."""

from __future__ import annotations

from torch import Tensor


def l1(restored: Tensor, truth: Tensor) -> Tensor:
    """mean |d|"""
    return (restored - truth).abs().mean()


def charbonnier(restored: Tensor, truth: Tensor, eps: float = 1e-3) -> Tensor:
    """mean sqrt(d^2 + eps): eps is not squared, as in MambaIR's option files (1e-3, not 1e-3 squared)."""
    return ((restored - truth).square() + eps).sqrt().mean()


LOSSES = {"l1": l1, "charbonnier": charbonnier}
