"""Mean intersection over union and pixel accuracy, from one confusion matrix over the whole set."""

from __future__ import annotations

import torch
from torch import Tensor

IGNORED = -1  # the class of pixels that nothing is said of, as in ssmzoo.data.dense


def confusion(predicted: Tensor, truth: Tensor, classes: int, ignore: int = IGNORED) -> Tensor:
    """(k k) counts of pixels by (true, predicted) class; both maps of one shape, pixels of `ignore` are left out."""
    kept = truth != ignore
    pairs = truth[kept].long() * classes + predicted[kept].long()
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


def class_iou(table: Tensor) -> Tensor:
    """(k) intersection over union of every class, NaN for classes that neither occur nor are predicted."""
    table = table.double()
    hit = table.diag()
    return hit / (table.sum(0) + table.sum(1) - hit)


def scores(table: Tensor) -> dict[str, float]:
    """{"miou", "pixel_accuracy", "mean_accuracy"}: means over classes leave out those that are NaN."""
    double = table.double()
    return {
        "miou": class_iou(table).nanmean().item(),
        "pixel_accuracy": (double.diag().sum() / double.sum().clamp(min=1)).item(),
        "mean_accuracy": (double.diag() / double.sum(1)).nanmean().item(),
    }
