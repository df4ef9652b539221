"""Stochastic depth: a residual branch is left out for single samples, more often the deeper it stands."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ssmzoo.ops.eager import eager


class DropPath(nn.Module):
    """Zero the branch of a sample with probability p in training, divide the others by 1 - p. (b ...) -> (b ...)"""

    def __init__(self, p: float = 0.0):
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"a drop path rate must lie in [0, 1), got {p}")
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factors(x) if self.p and self.training else x

    def factors(self, x: Tensor) -> Tensor:
        """0 or 1 / (1 - p) for every sample: (b 1 ...)"""
        return x.new_empty(x.shape[0], *[1] * (x.ndim - 1)).bernoulli_(1 - self.p).div_(1 - self.p)

    def extra_repr(self) -> str:
        return f"p={self.p:.3g}"


class FusedDropPathAdd(DropPath):
    """x + DropPath(branch(x)) in one step, so that on a CPU hardly a sample is computed only to be multiplied by 0.

    per_sample  the branch treats every sample independently (BatchNorm does not); otherwise all samples are computed
    forward     x (b ...) and the modules of the branch, one behind the other: `add(x, norm, mlp)` is x + mlp(norm(x))
    """

    def __init__(self, p: float = 0.0, per_sample: bool = True):
        super().__init__(p)
        self.per_sample = per_sample

    def forward(self, x: Tensor, *branch: Callable[[Tensor], Tensor]) -> Tensor:
        if not (self.p and self.training):
            return x + through(branch, x)
        factors = self.factors(x)
        if self.per_sample and x.is_cpu and eager(x):
            return self.add_kept(x, branch, factors)
        return torch.addcmul(x, through(branch, x), factors)

    def add_kept(self, x: Tensor, branch: tuple, factors: Tensor) -> Tensor:
        """The sum with the branch computed for the samples that are kept.

        Their number is rounded up to eighths of the batch, as oneDNN keeps a compiled kernel for every shape it meets.
        """
        order = factors.flatten().argsort(descending=True, stable=True)
        kept, step = int(factors.count_nonzero()), -(-len(x) // 8)
        computed = -(-kept // step) * step
        if not 0 < computed < len(x):
            return torch.addcmul(x, through(branch, x), factors)
        y = through(branch, x.index_select(0, order[:computed]))[:kept]
        dtype = torch.promote_types(x.dtype, y.dtype)
        return x.to(dtype).index_add(0, order[:kept], y.to(dtype), alpha=1 / (1 - self.p))


def through(modules: tuple[Callable[[Tensor], Tensor], ...], x: Tensor) -> Tensor:
    for module in modules:
        x = module(x)
    return x


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """`depth` rates from 0 for the first block to `rate` for the last one, equally spaced."""
    return [rate * i / max(depth - 1, 1) for i in range(depth)]
