"""Anomalies in a series: reconstruction and association losses, a score per point, a threshold, what it finds."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ssmzoo.suggest import nearest
from ssmzoo.tasks.base import Report, StepOutput, Task
from ssmzoo.tasks.metrics.anomaly_table import Found, find, table, verdict
from ssmzoo.tasks.objectives.association import anomaly_score, association_losses
from ssmzoo.tasks.series_baselines import BASELINES

CHOICES = {
    "threshold_on": ("train", "train+test"),
    "stop_on": ("reconstruction", "both"),
    "adjustment": ("whole", "published"),
}


class AnomalyDetection(Task):
    """Train a model whose forward returns AnomalyOutput on windows {"x" (b l c)}.

    k, temperature  weight of the discrepancy in both losses; its factor in the score
    ratio           percent of the scores that the threshold lets through
    threshold_on    train: those of the training part; train+test: of both parts, as published (it looks at the test)
    stop_on         what the best checkpoint has and early stopping watches: reconstruction, the lowest error; both, as
                    published: the last validation at which both losses were lower than ever
    adjustment      whole: point adjustment of whole segments; published: the released loop, see `metrics.anomaly`
    vus_window      widest slope of the volumes under the surface, in points
    baselines       compare with isolation forest, moving z-score and PCA

    Training: both losses are back-propagated, and their gradients added. Errors are in squared standard deviations.
    """

    unit = "windows"
    monitor, mode = "rec", "min"

    def __init__(
        self,
        model: nn.Module,
        optim: Callable[[nn.Module], Any] | None = None,
        k: float = 3.0,
        temperature: float = 50.0,
        ratio: float = 1.0,
        threshold_on: str = "train",
        stop_on: str = "reconstruction",
        adjustment: str = "whole",
        vus_window: int = 100,
        baselines: bool = True,
    ):
        super().__init__(model, optim)
        for name, value in (("threshold_on", threshold_on), ("stop_on", stop_on), ("adjustment", adjustment)):
            known = CHOICES[name]
            if value not in known:
                raise ValueError(
                    f"task.{name} = {value!r}{nearest(str(value), known)}; choose one of {', '.join(known)}"
                )
        if not 0 < ratio < 100 or k < 0 or temperature < 0 or vus_window < 0:
            raise ValueError(
                f"task.ratio = {ratio} must lie between 0 and 100 percent, and task.k = {k}, task.temperature = "
                f"{temperature}, task.vus_window = {vus_window} must not be negative"
            )
        self.k, self.temperature, self.ratio, self.threshold_on = k, temperature, ratio, threshold_on
        self.published, self.vus_window, self.baselines = adjustment == "published", vus_window, baselines
        self._lowest, self._improvements = [float("inf")] * 2, 0
        if stop_on == "both":
            self.monitor, self.mode = "improvements", "max"

    def step(self, batch: dict[str, Tensor], training: bool) -> StepOutput:
        x = batch["x"]
        losses = association_losses(self.model(x), x, self.k)
        metrics = {"rec": losses.rec.detach(), "discrepancy": losses.series.detach()}
        if not training:
            metrics |= {"loss1": losses.loss1, "loss2": losses.loss2}
        named = {"loss1": losses.loss1, "loss2": losses.loss2}
        return StepOutput(losses.loss1 + losses.loss2, metrics, len(x), losses=named)

    def derived(self, means: dict[str, float]) -> dict[str, float]:
        """Counts the validations at which both losses were lower than ever, which the published stopping goes by."""
        both = [means["loss1"], means["loss2"]]
        if self.trainer.state.fn == "fit" and all(now < then for now, then in zip(both, self._lowest)):
            self._lowest, self._improvements = both, self._improvements + 1
        return means | ({"improvements": float(self._improvements)} if self.monitor == "improvements" else {})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["task"] |= {"lowest": self._lowest, "improvements": self._improvements}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        saved = checkpoint.get("task", {})
        self._lowest = saved.get("lowest", self._lowest)
        self._improvements = saved.get("improvements", self._improvements)

    @torch.no_grad()
    def scores(self, data, part, temperature: float | None = None) -> np.ndarray:
        """(t) float64 of a part: of every point the score in the first window that holds it, or the mean over
        windows that overlap on purpose (data.score_stride). temperature: another than the task's; 0: the error alone.
        """
        was_training = self.model.training
        self.model.eval()
        temperature = self.temperature if temperature is None else temperature
        batches = (batch["x"].to(self.device) for batch in data.windows(part))
        found = [anomaly_score(self.model(x), x, temperature).double().cpu().numpy() for x in batches]
        self.model.train(was_training)
        return spread(np.concatenate(found), part.starts, len(part.values))

    def report(self, run_dir: Path, validation: dict[str, float]) -> Report:
        rows = {"validation reconstruction error": f"{validation['rec']:.4g} squared deviations"}
        found = self.evaluate(run_dir, self.trainer.datamodule)
        return found._replace(rows=rows | found.rows)

    def evaluate(self, out: Path, data) -> Report:
        """What it finds in the test part, beside its error alone and the baselines; scores.csv, measures.csv and
        anomalies.png."""
        train, test = data.part("train"), data.part("test")
        own = find(self.scores(data, train), self.scores(data, test), test.labels, self)
        write_scores(out / "scores.csv", own, test.labels)
        from ssmzoo.tasks.series_figure import draw_series

        figure = draw_series(out / "anomalies.png", test, own, f"{type(self.model).__name__} on {data.parts.source}")
        rows = {
            "series": f"{data.parts.source}: {len(train.values):,} points train, {len(test.values):,} test",
            "threshold": f"{own.threshold:.4g}, percentile {100 - self.ratio:g} of the scores of {self.threshold_on}",
            "points reported": f"{int(own.predicted.sum()):,} of {len(test.values):,}",
            "scores": str(out / "scores.csv"),
        }
        texts = {"about the series": "\n".join(data.notes)} if data.notes else {}
        if test.labels is None:
            return Report(rows, texts, [figure])
        name = type(self.model).__name__
        alone = find(self.scores(data, train, 0.0), self.scores(data, test, 0.0), test.labels, self)
        methods = {name: own, "its error alone": alone} | self.compared(train, test, data.window)
        write_measures(out / "measures.csv", methods)
        title = "test part, percent (areas: no threshold; adjusted counts are optimistic)"
        return Report(rows | verdict(methods), texts | {title: table(methods)}, [figure])

    def compared(self, train, test, window: int) -> dict[str, Found]:
        if not self.baselines:
            return {}
        parts = [part.values.double().numpy() for part in (train, test)]
        return {name: find(*method(*parts, window), test.labels, self) for name, method in BASELINES.items()}


def spread(scores: np.ndarray, starts, length: int) -> np.ndarray:
    """Window scores (n l) -> (length): side by side, the first window that holds a point; overlapping, the mean."""
    window, total, count = scores.shape[1], np.zeros(length), np.zeros(length)
    side_by_side = len(starts) < 2 or starts[1] - starts[0] >= window
    for start, row in zip(starts, scores):
        span = slice(start, start + window)
        new = count[span] == 0 if side_by_side else np.ones(window, bool)
        total[span] += np.where(new, row, 0)
        count[span] += new
    return total / np.maximum(count, 1)


def write_measures(file: Path, methods: dict[str, Found]) -> None:
    """A row a method, shares between 0 and 1."""
    with open(file, "w", newline="") as lines:
        writer = csv.writer(lines)
        writer.writerow(["method", *next(iter(methods.values())).measures.row()])
        writer.writerows(
            [name, *(f"{v:.6f}" for v in found.measures.row().values())] for name, found in methods.items()
        )


def write_scores(file: Path, found: Found, labels: np.ndarray | None) -> None:
    with open(file, "w", newline="") as lines:
        writer = csv.writer(lines)
        writer.writerow(["point", "score", "predicted"] + ([] if labels is None else ["label"]))
        for i, (score, hit) in enumerate(zip(found.score, found.predicted)):
            writer.writerow([i, f"{score:.8g}", int(hit)] + ([] if labels is None else [int(labels[i])]))
