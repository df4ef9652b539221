"""Areas and volumes under the curves of an anomaly score: no threshold is chosen.

    ROC, PR        of points (scikit-learn)
    range form     labels rise and fall around every segment over w // 2 points as sqrt(1 - i / w); recall counts that
                   weight and is multiplied by the share of segments that are met at all; 250 thresholds
    VUS            mean of the range form over w = 0 .. W

Source: Paparrizos et al. 2022 (PVLDB 15(11)). The libraries that have VUS pin older versions of what the zoo needs;
tests/tasks/test_anomaly_metrics.py holds the numbers that one of them gives.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ssmzoo.tasks.metrics.anomaly import segments

THRESHOLDS = 250


class Areas(NamedTuple):
    roc: float
    pr: float


def point_areas(score: np.ndarray, label: np.ndarray) -> Areas:
    """Areas under the ROC curve and the precision-recall curve (average precision) of points."""
    from sklearn.metrics import average_precision_score, roc_auc_score

    return Areas(float(roc_auc_score(label, score)), float(average_precision_score(label, score)))


def range_areas(score: np.ndarray, label: np.ndarray, width: int) -> Areas:
    """The range form with slopes of width // 2 points; width 0 or 1: none."""
    label = np.asarray(label, dtype=bool)
    weight = soft_labels(label, width)
    order = np.argsort(-score, kind="stable")
    ranked = score[order]
    chosen = ranked[np.linspace(0, len(score) - 1, THRESHOLDS, dtype=int)]
    above = np.searchsorted(-ranked, -chosen, side="right")  # points at or over each threshold
    hit = np.concatenate([[0.0], np.cumsum(weight[order])])[above]
    peaks = np.array([score[a:b].max() for a, b in segments(weight > 0)])
    met = (peaks[None] >= chosen[:, None]).mean(1)
    positive = (label.sum() + weight.sum()) / 2
    recall = np.minimum(hit / positive, 1) * met
    false = np.minimum((above - hit) / max(len(score) - positive, 1e-12), 1)
    precision = hit / above
    tpr, fpr = np.concatenate([[0], recall, [1]]), np.concatenate([[0], false, [1]])
    pr = (np.diff(np.concatenate([[0], recall])) * _middles(np.concatenate([[1], precision]))).sum()
    return Areas(float((np.diff(fpr) * _middles(tpr)).sum()), float(pr))


def volumes(score: np.ndarray, label: np.ndarray, width: int = 100) -> Areas:
    """VUS-ROC and VUS-PR over slopes of 0 .. width points."""
    found = np.array([range_areas(score, label, w) for w in range(width + 1)])
    return Areas(*found.mean(0).tolist())


def soft_labels(label: np.ndarray, width: int) -> np.ndarray:
    """Labels with slopes: 1 within a segment, falling as sqrt(1 - i / width) over width // 2 points beside it."""
    weight, reach = label.astype(float), width // 2
    for start, end in segments(label) if width > 1 else ():
        after, before = np.arange(end - 1, min(end - 1 + reach, len(label))), np.arange(max(start - reach, 0), start)
        weight[after] += np.sqrt(1 - (after - (end - 1)) / width)
        weight[before] += np.sqrt(1 - (start - before) / width)
    return weight.clip(0, 1)


def _middles(values: np.ndarray) -> np.ndarray:
    return (values[1:] + values[:-1]) / 2
