"""How well scores of a series find its true anomalies: thresholds, raw and adjusted counts, affiliation.

Series are arrays over time: scores (t) float, predictions and labels (t) bool. A segment is a maximal run of true
labels. Areas under curves are in anomaly_areas.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Confusion(NamedTuple):
    """Counts of points; a ratio without a denominator is 0."""

    tp: int
    fp: int
    fn: int
    tn: int

    @property
    def accuracy(self) -> float:
        return (self.tp + self.tn) / max(1, sum(self))

    @property
    def precision(self) -> float:
        return self.tp / max(1, self.tp + self.fp)

    @property
    def recall(self) -> float:
        return self.tp / max(1, self.tp + self.fn)

    @property
    def f1(self) -> float:
        return 2 * self.tp / max(1, 2 * self.tp + self.fp + self.fn)


def percentile_threshold(scores: Sequence[np.ndarray], ratio: float) -> float:
    """What `ratio` percent of all given scores lie above (linear interpolation)."""
    return float(np.percentile(np.concatenate(list(scores)), 100 - ratio))


def confusion(predicted: np.ndarray, label: np.ndarray) -> Confusion:
    p, y = np.asarray(predicted, dtype=bool), np.asarray(label, dtype=bool)
    if p.shape != y.shape:
        raise ValueError(f"{len(p)} predictions and {len(y)} labels: both must have one entry per point")
    return Confusion(int((p & y).sum()), int((p & ~y).sum()), int((~p & y).sum()), int((~p & ~y).sum()))


def segments(label: np.ndarray) -> list[tuple[int, int]]:
    """[(first, one behind the last)] of every run of true labels."""
    edges = np.diff(np.concatenate([[0], np.asarray(label, dtype=np.int8), [0]]))
    return list(zip(np.flatnonzero(edges == 1).tolist(), np.flatnonzero(edges == -1).tolist()))


def adjusted(predicted: np.ndarray, label: np.ndarray, published: bool = False) -> np.ndarray:
    """Point adjustment: a true segment with one predicted point counts as predicted as a whole.

    published   the released loop walks backwards only as far as index 1: a segment from index 0 on keeps what was
                predicted there. Adjusted counts are optimistic: read them beside the raw ones (Kim et al., AAAI 2022)
    """
    out = np.array(predicted, dtype=bool)
    for start, end in segments(label):
        if out[start:end].any():
            out[max(start, 1) if published else start : end] = True
    return out


class Affiliation(NamedTuple):
    """Means over the true segments; precision over those with a prediction in their zone, 0 without any."""

    precision: float
    recall: float

    @property
    def f1(self) -> float:
        return 2 * self.precision * self.recall / max(1e-12, self.precision + self.recall)


def affiliation(predicted: np.ndarray, label: np.ndarray) -> Affiliation:
    """Affiliation precision and recall (Huet, Navarro, Rossi, KDD 2022): distances in time, against a random guess.

    Every true segment owns the zone up to the middle between it and its neighbours. Precision is the mean over the
    predicted time of the probability that a uniform draw from the zone lies farther from the segment; recall the mean
    over the segment's time of the probability that it lies farther from that moment than the nearest prediction does.
    """
    truth, guesses, length = segments(label), segments(predicted), len(label)
    if not truth:
        raise ValueError("affiliation needs at least one true segment")
    middles = [(a[1] + b[0]) / 2 for a, b in zip(truth, truth[1:])]
    zones = zip([0.0, *middles], [*middles, float(length)])
    precisions, recalls = [], []
    for segment, zone in zip(truth, zones):
        inside = [(max(a, zone[0]), min(b, zone[1])) for a, b in guesses if min(b, zone[1]) > max(a, zone[0])]
        recalls.append(_recall(segment, inside, zone) if inside else 0.0)
        if inside:
            precisions.append(_precision(segment, inside, zone))
    return Affiliation(float(np.mean(precisions)) if precisions else 0.0, float(np.mean(recalls)))


def _precision(segment, guesses, zone) -> float:
    (low, high), (first, last) = segment, zone
    total = sum(b - a for a, b in guesses)
    gained = sum(max(0.0, min(b, high) - max(a, low)) for a, b in guesses)  # within the segment: certain
    narrow = min(low - first, last - high)
    for a, b in guesses:
        for start, end in ((a, min(b, low)), (max(a, high), b)):
            if end > start:
                t = _grid(start, end)
                distance = np.maximum(low - t, t - high)
                nearer = (high - low) + distance + np.minimum(distance, narrow)  # of the zone
                gained += _integral(1 - nearer / (last - first), t)
    return gained / total


def _recall(segment, guesses, zone) -> float:
    first, last = zone
    t = _grid(*segment)
    distance = np.min([np.maximum(0, np.maximum(a - t, t - b)) for a, b in guesses], axis=0)
    nearer = np.minimum(t + distance, last) - np.maximum(t - distance, first)
    return _integral(1 - nearer / (last - first), t) / (segment[1] - segment[0])


def _grid(start: float, end: float) -> np.ndarray:
    """Quarter steps: the integrands are linear between them, so that the trapezoidal rule is exact."""
    return np.linspace(start, end, round(4 * (end - start)) + 1)


def _integral(values: np.ndarray, t: np.ndarray) -> float:
    return float(((values[1:] + values[:-1]) / 2 * np.diff(t)).sum())
