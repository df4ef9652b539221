"""Stochastic depth: a residual branch is left out for single samples, more often the deeper it stands."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ssmzoo.ops.eager import eager


class DropPath(nn.Module):
    """Zero the branch of a sample with probability p in training, divide the others by 1 - p. (b ...) -> (b ...)

    apart  the branch treats every sample by itself (BatchNorm does not), so that `add` need not compute what is zeroed
    """

    def __init__(self, p: float = 0.0, apart: bool = True):
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"a drop path rate must lie in [0, 1), got {p}")
        self.p, self.apart = p, apart

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factors(x) if self.active() else x

    def add(self, x: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
        """x + self(branch(x)); on a CPU the branch is computed for few samples besides those whose factor is not 0.

        Their number is rounded up to eighths of the batch, as oneDNN keeps a compiled kernel for every shape it meets.
        """
        if not self.active():
            return x + branch(x)
        factors = self.factors(x)
        if not (self.apart and x.device.type == "cpu" and eager(x)):
            return torch.addcmul(x, branch(x), factors)
        order = factors.flatten().argsort(descending=True, stable=True)
        kept, step = int(factors.count_nonzero()), -(-len(x) // 8)
        computed = -(-kept // step) * step
        if not 0 < computed < len(x):
            return torch.addcmul(x, branch(x), factors)
        y = branch(x.index_select(0, order[:computed]))[:kept]
        dtype = torch.promote_types(x.dtype, y.dtype)
        return x.to(dtype).index_add(0, order[:kept], y.to(dtype), alpha=1 / (1 - self.p))

    def active(self) -> bool:
        return self.p > 0 and self.training

    def factors(self, x: Tensor) -> Tensor:
        """0 or 1 / (1 - p) for every sample: (b 1 ...)"""
        return x.new_empty(x.shape[0], *[1] * (x.ndim - 1)).bernoulli_(1 - self.p).div_(1 - self.p)

    def extra_repr(self) -> str:
        return f"p={self.p:.3g}"


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """`depth` rates from 0 for the first block to `rate` for the last one, equally spaced."""
    return [rate * i / max(depth - 1, 1) for i in range(depth)]
