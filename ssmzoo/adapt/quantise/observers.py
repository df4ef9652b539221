"""What activations looked like on the calibration text: static scales of 8-bit integers follow from it.

    RunningMax          the largest |x| of all samples
    RunningPercentile   per sample the alpha-quantile of |x|;  m <- m + sigma (q - m), the first sample initialises

Observers keep one value per part of the last axis. Source: Chiang et al. 2024 (arXiv 2410.13229), 2025 (2503.22879).
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST, LEAST_MAX, LEAST_SCALE = 127, 1e-5, 1e-6
ALPHA, SIGMA = 0.9995, 0.01


class RunningMax:
    """parts (c) number of the part that a channel of the last axis belongs to; None: one part"""

    def __init__(self, parts: Tensor | None = None):
        self.parts = parts
        self.value: Tensor | None = None  # (number of parts)

    def update(self, x: Tensor) -> None:
        """x (... c)"""
        new = self.measure(x.detach().abs())
        self.value = new if self.value is None else self.combine(new)

    def measure(self, x: Tensor) -> Tensor:
        channels = x.flatten(0, -2).amax(0)
        if self.parts is None:
            return channels.amax().view(1)
        return channels.new_zeros(int(self.parts.max()) + 1).scatter_reduce(0, self.parts, channels, "amax")

    def combine(self, new: Tensor) -> Tensor:
        return torch.maximum(self.value, new)

    def scale(self) -> Tensor:
        """One scale per part, fp32; a part that was always zero gets 1e-6."""
        if self.value is None:
            raise ValueError("no calibration sample has reached this layer; give more text")
        return (self.value.float() / LARGEST).clamp_min(LEAST_SCALE)


class RunningPercentile(RunningMax):
    """alpha: the share of values that are to be represented; sigma: the weight of a new sample"""

    def __init__(self, parts: Tensor | None = None, alpha: float = ALPHA, sigma: float = SIGMA):
        super().__init__(parts)
        if not 0 < alpha <= 1 or not 0 < sigma <= 1:
            raise ValueError(f"percentile = {alpha} and sigma = {sigma} must lie in (0, 1]")
        self.alpha, self.sigma = alpha, sigma

    def measure(self, x: Tensor) -> Tensor:
        x = x.flatten(0, -2)
        n = 1 if self.parts is None else int(self.parts.max()) + 1
        pieces = [x if self.parts is None else x[:, self.parts == i] for i in range(n)]
        return torch.stack([quantile(piece.flatten(), self.alpha) for piece in pieces])

    def combine(self, new: Tensor) -> Tensor:
        return self.value + self.sigma * (new - self.value)


def quantile(x: Tensor, alpha: float) -> Tensor:
    """The alpha-quantile of x (n) with linear interpolation; torch's stops at 16 million values."""
    at = alpha * (x.numel() - 1)
    low = int(at)
    below = x.kthvalue(low + 1).values
    return below if at == low else torch.lerp(below, x.kthvalue(min(low + 2, x.numel())).values, at - low)
