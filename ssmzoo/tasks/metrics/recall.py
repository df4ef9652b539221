"""Accuracy per case of a recall bench: a table, a CSV and a heat map."""

from __future__ import annotations

import csv
import statistics
import textwrap
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ssmzoo.terminal import caption


def example_accuracy(right: Tensor, asked: Tensor) -> Tensor:
    """Share of right answers of every example: right, asked (b l) bool -> (b) float64."""
    return (right & asked).sum(-1).double() / asked.sum(-1).clamp(min=1)


class CaseTable:
    """Mean accuracy over the examples of every case (two sizes), and its standard error."""

    def __init__(self):
        self.sums: dict[tuple[int, int], np.ndarray] = {}  # examples, sum and sum of squares of their accuracies

    def add(self, case: Tensor, accuracy: Tensor) -> None:
        """case (b 2), accuracy (b)"""
        for key in {tuple(row) for row in case.tolist()}:
            mine = accuracy[(case == torch.tensor(key)).all(-1)].double().cpu().numpy()
            found = np.array([len(mine), mine.sum(), (mine**2).sum()])
            self.sums[key] = self.sums.get(key, np.zeros(3)) + found

    def accuracy(self, case: tuple[int, int]) -> float:
        return float(self.sums[case][1] / self.sums[case][0])

    def error(self, case: tuple[int, int]) -> float:
        n, total, squares = self.sums[case]
        return float(np.sqrt(max(0.0, squares / n - (total / n) ** 2) / n))

    def mean(self, cases) -> float:
        """Over the cases that were measured; NaN for none."""
        found = [self.accuracy(case) for case in cases if case in self.sums]
        return float(np.mean(found)) if found else float("nan")

    def write_csv(self, path: Path, axes: tuple[str, str], state_bytes: dict[tuple[int, int], int]) -> None:
        """One line per case; state_bytes: of a sequence, empty when the model's mixers do not tell."""
        lines = [f"{axes[0]},{axes[1]},accuracy,standard_error,examples,state_bytes"]
        for case in sorted(self.sums):
            n, held = int(self.sums[case][0]), state_bytes.get(case, "")
            lines.append(f"{case[0]},{case[1]},{self.accuracy(case):.6f},{self.error(case):.6f},{n},{held}")
        path.write_text("\n".join(lines) + "\n")

    def lines(self, axes: tuple[str, str], trained) -> str:
        rows = [f"{axes[0]:>10}{axes[1]:>10}{'accuracy':>11}{'+-':>8}  trained"]
        rows += [
            f"{a:>10}{b:>10}{100 * self.accuracy((a, b)):>9.2f} %{100 * self.error((a, b)):>8.2f}"
            f"  {'yes' if (a, b) in trained else 'no'}"
            for a, b in sorted(self.sums)
        ]
        return "\n".join(rows)

    def draw(self, png: Path, axes: tuple[str, str], trained, title: str) -> Path:
        """Heat map of the accuracies, first size across and second one down; trained cases are framed."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        across, down = (sorted({case[i] for case in self.sums}) for i in (0, 1))
        image = np.full((len(down), len(across)), np.nan)
        for a, b in self.sums:
            image[down.index(b), across.index(a)] = 100 * self.accuracy((a, b))
        size = (2.2 + 0.8 * len(across), 1.8 + 0.6 * len(down))
        figure, ax = plt.subplots(figsize=size, constrained_layout=True)
        shown = ax.imshow(image, cmap="viridis", vmin=0, vmax=100, origin="lower", aspect="auto")
        for a, b in self.sums:
            x, y = across.index(a), down.index(b)
            ax.text(
                x, y, f"{image[y, x]:.0f}", ha="center", va="center", color="white" if image[y, x] < 60 else "black"
            )
            if (a, b) in trained:
                ax.add_patch(plt.Rectangle((x - 0.47, y - 0.47), 0.94, 0.94, fill=False, edgecolor="#D55E00", lw=2))
        ax.set_xticks(range(len(across)), across)
        ax.set_yticks(range(len(down)), down)
        ax.set(xlabel=axes[0], ylabel=axes[1])
        ax.set_title(f"{title}\n(framed: trained)", fontsize=9)
        figure.colorbar(shown, ax=ax, label="accuracy (%)")
        figure.savefig(png, dpi=120)
        plt.close(figure)
        return png


def memory_point(recall_csv: Path) -> tuple[float, float] | None:
    """(bytes of state, accuracy) of a run, means over its cases; None for a file that does not hold both."""
    if not recall_csv.exists():
        return None
    with recall_csv.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or not all(row.get("state_bytes") and row.get("accuracy") for row in rows):
        return None
    return tuple(statistics.mean(float(row[key]) for row in rows) for key in ("state_bytes", "accuracy"))


def draw_memory(points: dict[str, list[tuple[float, float]]], png: Path, what: str = "accuracy") -> Path:
    """Accuracy or loss against bytes of state; {configuration: (bytes, accuracy or loss) of each of its runs}."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(6, 4), constrained_layout=True)
    for name, runs in points.items():
        held, right = zip(*runs)
        right = [100 * r for r in right] if what == "accuracy" else right
        spread = statistics.stdev(right) if len(right) > 1 else 0.0
        ax.errorbar(statistics.mean(held), statistics.mean(right), spread, fmt="o", capsize=3, label=caption(name))
    accuracy = what == "accuracy"
    of = "mean over the test sizes" if accuracy else "at the trained length"
    ax.set(xscale="log", xlabel=f"state (bytes a sequence, {of})")
    ax.set_ylabel("accuracy (%)" if accuracy else "validation loss (nats per token)")
    kind = "recall" if accuracy else "loss"
    ax.set_title(f"{kind} against memory (bars: one standard deviation over seeds)", fontsize=9)
    ax.grid(alpha=0.3)
    draw_legend(figure, ax)
    figure.savefig(png, dpi=120)
    plt.close(figure)
    return png


def draw_legend(figure, ax) -> None:
    """Inside the axes, or, where names are long, in lines below them, so that the axes keep their size."""
    handles, names = ax.get_legend_handles_labels()
    if max(map(len, names), default=0) <= 40:
        ax.legend(fontsize=8)
        return
    wrapped = [textwrap.fill(name, 95) for name in names]
    figure.set_figheight(figure.get_figheight() + 0.14 * "\n".join(wrapped).count("\n") + 0.3)
    figure.legend(handles, wrapped, loc="outside lower left", fontsize=7)
