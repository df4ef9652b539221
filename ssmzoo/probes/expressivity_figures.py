"""Figures of the expressivity probe."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ssmzoo.data.automata import Automaton
from ssmzoo.terminal import caption

BLUE, ORANGE = "#0072B2", "#D55E00"


def _figure(*args, **kwargs):
    import matplotlib

    matplotlib.use("Agg", force=False)
    import matplotlib.pyplot as plt

    return plt.subplots(*args, constrained_layout=True, **kwargs)


def _save(figure, png: Path) -> Path:
    import matplotlib.pyplot as plt

    figure.savefig(png, dpi=110)
    plt.close(figure)
    return png


def _short(symbol: str) -> str:
    return caption(symbol.split(" (")[0].split(":")[0])


def moves(png: Path, learned: Tensor, truth: Tensor, automaton: Automaton) -> Path:
    """Learned transitions above, the automaton's below, one column per symbol (at most six)."""
    shown = min(6, len(truth))
    figure, axes = _figure(2, shown, figsize=(2.6 * shown + 1, 5), squeeze=False)
    for symbol in range(shown):
        for row, (matrix, what) in enumerate(((learned[symbol], "learned"), (truth[symbol], "automaton"))):
            image = axes[row, symbol].imshow(matrix.numpy(), vmin=0, vmax=1, cmap="Blues", interpolation="nearest")
            axes[row, symbol].set_title(f"{what}: {_short(automaton.symbols[symbol])}", fontsize=9)
            axes[row, symbol].set(xlabel="state", ylabel="next state")
    figure.colorbar(image, ax=axes, shrink=0.7, label="share")
    return _save(figure, png)


def spectra(png: Path, learned: list[Tensor], truth: list[Tensor], automaton: Automaton) -> Path:
    """Eigenvalues in the complex plane per symbol (at most six), over the unit circle and the automaton's own."""
    shown = min(6, len(learned))
    figure, axes = _figure(1, shown, figsize=(3.2 * shown, 3.6), squeeze=False)
    circle = np.exp(2j * np.pi * np.linspace(0, 1, 200))
    for symbol in range(shown):
        axis, values = axes[0, symbol], torch.as_tensor(learned[symbol]).to(torch.complex64)
        axis.plot(circle.real, circle.imag, color="0.7", linewidth=1)
        axis.scatter(
            truth[symbol].real, truth[symbol].imag, s=70, facecolors="none", edgecolors=ORANGE, label="automaton"
        )
        axis.scatter(values.real, values.imag, s=9, color=BLUE, label="model")
        axis.set(title=_short(automaton.symbols[symbol]), aspect="equal", xlabel="real", ylabel="imaginary")
    axes[0, 0].legend(fontsize=7, loc="lower left")
    return _save(figure, png)


def trajectories(png: Path, points: Tensor, states: Tensor, automaton: Automaton) -> Path:
    """points (b l 2) coloured by automaton state (b l), and the path of the first string."""
    figure, axis = _figure(figsize=(5.5, 5))
    image = axis.scatter(*points.flatten(0, 1).T, c=states.flatten(), s=5, alpha=0.4, cmap="turbo")
    axis.plot(*points[0].T, color="0.2", linewidth=0.6, alpha=0.7, label="one string")
    figure.colorbar(image, label=f"state of {caption(automaton.name)}")
    axis.set(xlabel="first principal direction", ylabel="second", title="logits after every symbol")
    axis.legend(fontsize=8)
    return _save(figure, png)


def drift(png: Path, path, automaton: Automaton) -> Path:
    """Distance from the right state, and accuracy, along very long strings."""
    figure, (above, below) = _figure(2, 1, figsize=(7, 5), sharex=True)
    above.semilogy(path.steps, np.maximum(path.distance, 1e-8), color=BLUE)
    above.axhline(1, color=ORANGE, linestyle="--", label="half-way to another state")
    above.set(ylabel="distance / half gap", title=f"drift on {caption(automaton.name)}")
    below.plot(path.steps, 100 * path.accuracy, color=BLUE)
    below.set(xlabel="symbols read", ylabel="accuracy (%)", ylim=(-3, 103))
    for axis in (above, below):
        axis.grid(alpha=0.3)
    above.legend(fontsize=8)
    return _save(figure, png)
