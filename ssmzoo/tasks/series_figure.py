"""The picture of a scored series: its channels, the score with its threshold, true segments shaded, reported points."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ssmzoo.tasks.metrics.anomaly import segments
from ssmzoo.terminal import caption

SHOWN = 4  # channels


def draw_series(png: Path, part, found, title: str) -> Path:
    """part: values (t c) standardised and labels; found: score, threshold, predicted. Returns `png`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    values = part.values.cpu().numpy()
    moved = np.argsort(-values.std(0), kind="stable")[:SHOWN]
    figure, axes = plt.subplots(
        len(moved) + 1,
        1,
        figsize=(13, 1.9 * (len(moved) + 1) + 0.6),
        sharex=True,
        squeeze=False,
        constrained_layout=True,
    )
    axes, time = axes[:, 0], np.arange(len(values))
    for ax, channel in zip(axes, sorted(moved)):
        ax.plot(time, values[:, channel], linewidth=0.7, color="#30506f")
        ax.set_ylabel(f"channel {channel}\n(deviations)", fontsize=8)
        hit = np.flatnonzero(found.predicted)
        ax.plot(hit, values[hit, channel], ".", color="#c23b22", markersize=3, label="reported")
    axes[0].set_title(caption(title), fontsize=10)
    axes[-1].plot(time, found.score.clip(found.threshold * 1e-3), linewidth=0.7, color="#222222", label="score")
    axes[-1].axhline(found.threshold, color="#c23b22", linewidth=0.9, linestyle="--", label="threshold")
    axes[-1].set_yscale("log")
    axes[-1].set(xlabel="point of the test part", ylabel="score")
    for i, (start, end) in enumerate(segments(part.labels) if part.labels is not None else ()):
        for ax in axes:
            ax.axvspan(
                start - 0.5, end - 0.5, color="#f0b040", alpha=0.35, linewidth=0, label="anomaly" if i == 0 else None
            )
    for ax in (axes[0], axes[-1]):
        ax.legend(loc="upper right", fontsize=7)
    figure.savefig(png, dpi=110)
    plt.close(figure)
    return png
