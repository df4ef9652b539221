"""What scores find in a labelled series, for one method and for several side by side."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ssmzoo.tasks.metrics.anomaly import Affiliation, Confusion, adjusted, affiliation, confusion, percentile_threshold
from ssmzoo.tasks.metrics.anomaly_areas import Areas, point_areas, volumes


class Measures(NamedTuple):
    raw: Confusion
    adjusted: Confusion
    affiliation: Affiliation
    points: Areas
    volume: Areas

    def row(self) -> dict[str, float]:
        """Shares between 0 and 1 by name."""
        return {
            **{"precision": self.raw.precision, "recall": self.raw.recall, "f1": self.raw.f1},
            "adjusted_precision": self.adjusted.precision,
            **{"adjusted_recall": self.adjusted.recall, "adjusted_f1": self.adjusted.f1},
            "affiliation_precision": self.affiliation.precision,
            "affiliation_recall": self.affiliation.recall,
            **{"roc_auc": self.points.roc, "pr_auc": self.points.pr},
            **{"vus_roc": self.volume.roc, "vus_pr": self.volume.pr},
        }


class Found(NamedTuple):
    """score (t), threshold, predicted (t) bool, and measures where there are labels."""

    score: np.ndarray
    threshold: float
    predicted: np.ndarray
    measures: Measures | None


def find(train: np.ndarray, test: np.ndarray, labels: np.ndarray | None, settings) -> Found:
    """Threshold at settings.ratio percent of the scores of settings.threshold_on, applied to the test part."""
    base = (train, test) if settings.threshold_on == "train+test" else (train,)
    threshold = percentile_threshold(base, settings.ratio)
    predicted = test > threshold
    if labels is None:
        return Found(test, threshold, predicted, None)
    after = adjusted(predicted, labels, settings.published)
    measures = Measures(
        confusion(predicted, labels),
        confusion(after, labels),
        affiliation(predicted, labels),
        point_areas(test, labels),
        volumes(test, labels, settings.vus_window),
    )
    return Found(test, threshold, predicted, measures)


def table(methods: dict[str, Found]) -> str:
    """One line a method."""
    head = f"{'':<20}{'raw P':>7}{'R':>6}{'F1':>6}{'adj. P':>8}{'R':>6}{'F1':>6}{'affil. P':>10}{'R':>6}"
    lines = [head + f"{'ROC':>7}{'PR':>6}{'VUS-ROC':>9}{'VUS-PR':>8}"]
    for name, found in methods.items():
        p = [100 * v for v in found.measures.row().values()]
        cells = (7, 6, 6, 8, 6, 6, 10, 6, 7, 6, 9, 8)
        lines.append(f"{name[:19]:<20}" + "".join(f"{v:>{width}.1f}" for v, width in zip(p, cells)))
    return "\n".join(lines)


def verdict(methods: dict[str, Found]) -> dict[str, str]:
    """How the first method stands to the best of the others, said as it is."""
    (name, own), *others = [(n, f) for n, f in methods.items() if n != "its error alone"]
    rows = {}
    for key, title in (("f1", "raw F1"), ("vus_pr", "VUS-PR")):
        mine = own.measures.row()[key]
        rows[f"{title}"] = f"{100 * mine:.1f} %"
        if others:
            best, theirs = max(((n, f.measures.row()[key]) for n, f in others), key=lambda pair: pair[1])
            word = "beats" if mine > theirs else "does not beat"
            rows[f"{title}"] += f"; {name} {word} the best baseline, {best}, with {100 * theirs:.1f} %"
    return rows | {"F1 point-adjusted": f"{100 * own.measures.adjusted.f1:.1f} % (optimistic: see the raw one)"}
