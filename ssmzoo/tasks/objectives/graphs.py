"""Losses of graph tasks: (outputs, answers) -> mean over what has an answer, in fp32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """logits (n c), y (n) classes, -100: not asked. Nats."""
    return F.cross_entropy(logits.float(), y, ignore_index=IGNORE)


def weighted_cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Classes that are rare in the batch count more: (V - n_c) / V of V nodes, 0 for a class that is not there."""
    counts = torch.bincount(y[y != IGNORE], minlength=logits.shape[1]).float()
    weight = torch.where(counts > 0, (counts.sum() - counts) / counts.sum().clamp(min=1), 0.0)
    if not bool(weight.any()):  # a single class in the whole batch
        return cross_entropy(logits, y)
    return F.cross_entropy(logits.float(), y, weight, ignore_index=IGNORE)


def bce(logits: Tensor, y: Tensor) -> Tensor:
    """Independent labels y in {0, 1} of the same shape; NaN: unknown, left out."""
    logits, known = logits.reshape_as(y), ~y.isnan()
    return F.binary_cross_entropy_with_logits(logits.float()[known], y[known])


def l1(outputs: Tensor, y: Tensor) -> Tensor:
    """Mean absolute error; NaN: unknown, left out."""
    known = ~y.isnan()
    return (outputs.float().reshape_as(y) - y)[known].abs().mean()


def mse(outputs: Tensor, y: Tensor) -> Tensor:
    """Mean squared error; NaN: unknown, left out."""
    known = ~y.isnan()
    return (outputs.float().reshape_as(y) - y)[known].square().mean()


LOSSES = {f.__name__: f for f in (cross_entropy, weighted_cross_entropy, bce, l1, mse)}


def answered(y: Tensor) -> Tensor:
    """How many answers a loss is a mean over."""
    return (~y.isnan()).sum() if y.is_floating_point() else (y != IGNORE).sum()
