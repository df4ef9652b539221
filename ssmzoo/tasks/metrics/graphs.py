"""Metrics of graph tasks, collected batch by batch and exact over the whole set.

accuracy         share of right classes
class_accuracy   mean over all classes of the share that is found (0 for one that never occurs), as for SBM sets
macro_f1         mean of the classes' F1, over classes that occur or are predicted
ap               mean over labels of the average precision, over labels with a positive and a negative
mae              mean absolute error
mrr              mean over true pairs of 1 / rank of the second node among all nodes of its graph, by score
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IGNORE = -100


class Confusion:
    """table (c c): true class, predicted class."""

    def __init__(self, how: str, classes: int):
        self.how, self.classes = how, classes
        self.table = torch.zeros(classes, classes, dtype=torch.float64)

    def add(self, out: Any, batch: dict[str, Any]) -> None:
        y = batch["y"].cpu()
        asked, predicted = y != IGNORE, out.logits.argmax(-1).cpu()
        pairs = y[asked] * self.classes + predicted[asked]
        self.table += torch.bincount(pairs, minlength=self.classes**2).view(self.classes, self.classes)

    def merge(self, other: Confusion) -> None:
        self.table += other.table

    def value(self) -> float:
        right, there, found = self.table.diagonal(), self.table.sum(1), self.table.sum(0)
        if self.how == "accuracy":
            return (right.sum() / there.sum().clamp(min=1)).item()
        if self.how == "class_accuracy":
            return (right / there.clamp(min=1)).mean().item()
        known = there + found > 0
        return (2 * right / (there + found).clamp(min=1))[known].mean().item()


class AveragePrecision:
    """Scores and labels of everything, (n c)."""

    def __init__(self, how: str, classes: int):
        self.scores: list[Tensor] = []
        self.labels: list[Tensor] = []

    def add(self, out: Any, batch: dict[str, Any]) -> None:
        self.labels.append(batch["y"].float().cpu().reshape(len(batch["y"]), -1))
        self.scores.append(out.logits.float().cpu().reshape_as(self.labels[-1]))

    def merge(self, other: AveragePrecision) -> None:
        self.scores += other.scores
        self.labels += other.labels

    def value(self) -> float:
        scores, labels = torch.cat(self.scores), torch.cat(self.labels)
        found = []
        for score, label in zip(scores.T, labels.T):
            known = ~label.isnan()
            score, label = score[known], label[known] > 0
            if bool(label.any()) and not bool(label.all()):
                found.append(average_precision(score, label))
        return sum(found) / len(found) if found else float("nan")


def average_precision(score: Tensor, label: Tensor) -> float:
    """Area under precision against recall in steps, scores that are equal taken together. score (n), label (n) bool"""
    order = score.argsort(descending=True)
    score, hit = score[order], label[order].double()
    last = torch.ones_like(label)
    last[:-1] = score[1:] != score[:-1]  # the last of equal scores
    hits = hit.cumsum(0)[last]
    taken = torch.arange(1, len(score) + 1, dtype=torch.float64)[last]
    gained = torch.diff(hits, prepend=hits.new_zeros(1)) / hit.sum()
    return (gained * hits / taken).sum().item()


class AbsoluteError:
    def __init__(self, how: str, classes: int):
        self.total, self.count = 0.0, 0

    def add(self, out: Any, batch: dict[str, Any]) -> None:
        y = batch["y"]
        known = ~y.isnan()
        self.total += float((out.logits.double().reshape_as(y) - y)[known].abs().sum())
        self.count += int(known.sum())

    def merge(self, other: AbsoluteError) -> None:
        self.total, self.count = self.total + other.total, self.count + other.count

    def value(self) -> float:
        return self.total / max(1, self.count)


class ReciprocalRank:
    """Ranks among all nodes of the graph, the first node of the pair included (the raw form of LRGB)."""

    def __init__(self, how: str, classes: int):
        self.total, self.count = 0.0, 0

    def add(self, out: Any, batch: dict[str, Any]) -> None:
        a, b = batch["edge_label_index"][:, batch["y"] > 0]
        scores = out.x[a] @ out.x.T  # (q v)
        others = batch["batch"][a][:, None] == batch["batch"]
        own = scores.gather(1, b[:, None])
        above = ((scores > own) & others).sum(1)
        equal = ((scores == own) & others).sum(1) - 1
        self.total += float((1 / (1 + above + equal / 2)).sum())
        self.count += len(a)

    def merge(self, other: ReciprocalRank) -> None:
        self.total, self.count = self.total + other.total, self.count + other.count

    def value(self) -> float:
        return self.total / max(1, self.count)


METRICS = {
    **dict.fromkeys(("accuracy", "class_accuracy", "macro_f1"), Confusion),
    "ap": AveragePrecision,
    "mae": AbsoluteError,
    "mrr": ReciprocalRank,
}
SMALLER_IS_BETTER = ("mae",)


def measure(how: str, classes: int):
    """A collector with add(output, batch), merge(other) and value()."""
    return METRICS[how](how, classes)
