"""Accuracy as a function of string length, counted exactly."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ssmzoo.terminal import caption

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe-Ito: safe for the colour-blind


class LengthCurve:
    """Right answers and strings per length 1 .. max_length, and how many different strings were among them."""

    def __init__(self, max_length: int):
        self.right, self.count = np.zeros(max_length + 1, dtype=np.int64), np.zeros(max_length + 1, dtype=np.int64)
        self._hashes: list[np.ndarray] = []

    def add(self, right: np.ndarray, asked: np.ndarray, hashes: np.ndarray, query: bool = False) -> None:
        """right, asked (b l) bool per prefix, hashes (b l); with a query token position l + 1 answers for length l."""
        l = right.shape[1] - query
        first = 0 if query else 1
        columns = slice(1, None) if query else slice(None)
        self.right[first + query : l + 1] += right.sum(0)[columns]
        self.count[first + query : l + 1] += asked.sum(0)[columns]
        self._hashes.append(np.unique(hashes[asked]))

    @property
    def accuracy(self) -> np.ndarray:
        """(max_length,) share of right answers, NaN at lengths at which no string can end."""
        with np.errstate(invalid="ignore"):
            return self.right[1:] / self.count[1:]

    @property
    def distinct(self) -> int:
        return len(np.unique(np.concatenate(self._hashes))) if self._hashes else 0

    @property
    def first_below_100(self) -> int | None:
        wrong = np.flatnonzero(self.right < self.count)
        return int(wrong[0]) if len(wrong) else None

    def mean(self, low: int = 1, high: int | None = None) -> float:
        """Mean over the lengths low .. high of the accuracies, in %."""
        return float(100 * np.nanmean(self.accuracy[low - 1 : high]))

    def rows(self, trained: int) -> dict[str, str]:
        last = len(self.accuracy)
        rows = {
            f"accuracy, lengths 1 to {last}": f"{self.mean():.3f} % (mean over lengths), lowest "
            f"{100 * np.nanmin(self.accuracy):.2f} %"
        }
        if trained < last:
            key = f"accuracy, lengths {trained + 1} to {last}"
            rows[key] = f"{self.mean(trained + 1):.3f} % (never seen in training)"
        first = self.first_below_100
        rows["first length under 100 %"] = f"none up to {last}" if first is None else str(first)
        rows["strings tested"] = f"{int(self.count.sum()):,} ({self.distinct:,} distinct)"
        return rows

    def write_csv(self, path: Path) -> Path:
        lines = ["length,strings,right,accuracy"]
        lines += [
            f"{l},{self.count[l]},{self.right[l]},{self.right[l] / self.count[l]:.6f}"
            for l in range(1, len(self.count))
            if self.count[l]
        ]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path


class StreamCurve:
    """Right answers along a few very long strings, per chunk, and the first position with a wrong one."""

    def __init__(self):
        self.length, self.first_wrong = 0, None
        self.chunks: list[tuple[int, float]] = []  # (last position, accuracy of the chunk)

    def add(self, right: np.ndarray, asked: np.ndarray) -> None:
        wrong = (asked & ~right).any(0)
        if self.first_wrong is None and wrong.any():
            self.first_wrong = self.length + int(np.argmax(wrong)) + 1
        self.length += right.shape[1]
        self.chunks.append((self.length, float(right.sum() / max(1, asked.sum()))))

    def rows(self) -> dict[str, str]:
        rows, shown = {}, set()
        for target in (1_000, 2_000, 5_000, 10_000, 20_000, 50_000, 100_000, self.length):
            end, accuracy = next(((e, a) for e, a in self.chunks if e >= target), self.chunks[-1])
            if target <= self.length and end not in shown:
                shown.add(end)
                rows[f"accuracy around length {end:,}"] = f"{100 * accuracy:.3f} %"
        first = f"none up to {self.length:,}" if self.first_wrong is None else f"{self.first_wrong:,}"
        rows["first wrong position in long strings"] = first
        return rows

    def write_csv(self, path: Path) -> Path:
        """One row per chunk: its last position, its accuracy, and the first wrong position so far (empty: none)."""
        lines = ["position,accuracy,first_wrong"]
        lines += [
            f"{end},{accuracy:.6f},{self.first_wrong if self.first_wrong and self.first_wrong <= end else ''}"
            for end, accuracy in self.chunks
        ]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path


def draw_lengths(png: Path, curves: dict[str, LengthCurve], trained: int, title: str) -> Path:
    """Accuracy against length, one line per model; the trained lengths are shaded."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), constrained_layout=True)
    axes.axvspan(1, trained, color="0.9", label=f"trained lengths, 1 to {trained}")
    for (name, curve), colour in zip(curves.items(), COLOURS * (1 + len(curves) // len(COLOURS))):
        lengths = np.flatnonzero(curve.count)
        axes.plot(
            lengths, 100 * curve.right[lengths] / curve.count[lengths], color=colour, linewidth=1.5, label=caption(name)
        )
    axes.set(xlabel="string length (symbols)", ylabel="exact-match accuracy (%)", title=caption(title), ylim=(-3, 103))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left")
    figure.savefig(png, dpi=120)
    plt.close(figure)
    return png
