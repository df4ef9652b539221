"""Stochastic depth: a residual branch is left out for single samples, more often the deeper it stands."""

from __future__ import annotations

from torch import Tensor, nn


class DropPath(nn.Module):
    """Zero the branch of a sample with probability p in training, divide the others by 1 - p. (b ...) -> (b ...)"""

    def __init__(self, p: float = 0.0):
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"a drop path rate must lie in [0, 1), got {p}")
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if self.p == 0 or not self.training:
            return x
        keep = x.new_empty(x.shape[0], *[1] * (x.ndim - 1)).bernoulli_(1 - self.p)
        return x * keep.div_(1 - self.p)

    def extra_repr(self) -> str:
        return f"p={self.p:.3g}"


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """`depth` rates from 0 for the first block to `rate` for the last one, equally spaced."""
    return [rate * i / max(depth - 1, 1) for i in range(depth)]

