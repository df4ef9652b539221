"""Differentiable sorting: a row-stochastic matrix in place of a permutation.

    P[i, j] = softmax_j( -|v_j - sort(v)_i|^p / tau ),   sort(v) descending: row i picks the i-th largest v

Source: Prillo & Eisenschlos 2020 (arXiv 2006.16038).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def soft_sort(v: Tensor, tau: float = 1.0, power: float = 1.0, hard: bool = False) -> Tensor:
    """v (b l) -> P (b l l).

    tau, power  temperature (in units of v^power) and exponent of the distance
    hard        one-hot rows forward, the gradient of the soft ones backward
    """
    distance = (v[:, None, :] - v.sort(dim=-1, descending=True).values[:, :, None]).abs()
    P = torch.softmax(-(distance if power == 1 else distance.pow(power)) / tau, dim=-1)
    if not hard:
        return P
    picked = torch.zeros_like(P).scatter_(-1, P.argmax(-1, keepdim=True), 1.0)
    return picked - P.detach() + P


class SoftSort(nn.Module):
    """`soft_sort` with its settings."""

    def __init__(self, tau: float = 1.0, hard: bool = False, power: float = 1.0):
        super().__init__()
        if tau <= 0 or power <= 0:
            raise ValueError(f"SoftSort needs tau and power above 0, got tau={tau}, power={power}")
        self.tau, self.hard, self.power = tau, hard, power

    def forward(self, v: Tensor) -> Tensor:
        return soft_sort(v, self.tau, self.power, self.hard)
