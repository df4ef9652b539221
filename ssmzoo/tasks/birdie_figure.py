"""The curve of a mixture's weights during training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np


def draw_mixture(history: list[dict[str, Any]], last: list[float], objectives: list, png: Path) -> Path:
    """Areas of the weights per kind of objective over the steps, `last` being the weights since the last validation;
    below them the loss of every kind."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kinds = list(dict.fromkeys(objective.kind for objective in objectives))
    member = np.array([[objective.kind == kind for objective in objectives] for kind in kinds], dtype=float)
    steps = np.array([0, *(row["step"] for row in history)])
    weights = member @ np.array([*(row["weights"] for row in history), last]).T  # (kinds t+1), each from a step on
    losses = (member / member.sum(1, keepdims=True)) @ np.array([row["losses"] for row in history]).T
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 7), sharex=True, constrained_layout=True)
    colours = plt.get_cmap("tab10").colors
    top.stackplot(steps, weights, labels=kinds, colors=colours, step="post")
    for kind, line, colour in zip(kinds, losses, colours):
        bottom.plot(steps[1:], line, marker="o", markersize=3, label=kind, color=colour)
    top.set(ylabel="share of the samples", ylim=(0, 1), title="mixture of objectives")
    bottom.set(xlabel="step", ylabel="validation loss (nats per token)")
    top.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    bottom.grid(alpha=0.3)
    figure.savefig(png, dpi=120)
    plt.close(figure)
    return png
