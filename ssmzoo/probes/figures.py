"""Figures of the probes: axes with units, a legend, colours and line styles that survive print and colour blindness."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from ssmzoo.terminal import caption

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe & Ito
STYLES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (7, 3)))


def canvas(rows: int = 1, columns: int = 1, size: tuple[float, float] = (3.4, 3.0)):
    """A figure and its axes (rows columns), each of `size` inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def lines(
    axis,
    x: Sequence[float],
    curves: Mapping[str, Sequence[float]],
    xlabel: str,
    ylabel: str,
    title: str = "",
    **options,
) -> None:
    """Curves of different colour and dash; options go to axis.set."""
    for i, (name, y) in enumerate(curves.items()):
        axis.plot(
            x,
            _array(y),
            label=caption(name),
            color=COLOURS[i % 7],
            linestyle=STYLES[i % 7],
            marker="o" if len(x) < 12 else None,
            markersize=3,
        )
    axis.set(xlabel=xlabel, ylabel=ylabel, title=caption(title), **options)
    if isinstance(x, range) or all(isinstance(v, int) for v in x) and "xscale" not in options:
        whole(axis)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7, loc="best" if len(x) * len(curves) < 2000 else "upper right")


def whole(axis) -> None:
    """Ticks at whole numbers only: blocks, degrees, steps."""
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def heat(figure, axis, matrix, xlabel: str, ylabel: str, title: str, signed: bool = False, label: str = "") -> None:
    """A matrix; signed ones from blue over white to orange, others from white to dark."""
    matrix = _array(matrix)
    limit = max(float(np.abs(matrix).max()), 1e-12)
    options = dict(cmap="PuOr_r", vmin=-limit, vmax=limit) if signed else dict(cmap="cividis")
    image = axis.imshow(
        matrix, interpolation="nearest", aspect="auto" if matrix.shape[0] != matrix.shape[1] else "equal", **options
    )
    axis.set(xlabel=xlabel, ylabel=ylabel, title=caption(title))
    axis.title.set_fontsize(9)
    figure.colorbar(image, ax=axis, shrink=0.8, label=label)


def words(axis, labels: Sequence[str], scores: Sequence[float], title: str) -> None:
    """One bar per token, its text below; positive blue, negative orange and hatched."""
    scores = _array(scores)
    at = np.arange(len(scores))
    signed = scores.min() < 0
    axis.bar(at, np.maximum(scores, 0), color=COLOURS[0], label="for" if signed else "weight")
    if signed:
        axis.bar(at, np.minimum(scores, 0), color=COLOURS[1], hatch="///", label="against")
    few = len(labels) <= 64
    axis.set_xticks(at if few else at[:: max(1, len(at) // 32)])
    axis.set_xticklabels(
        [caption(word) for word in labels] if few else [str(i) for i in at[:: max(1, len(at) // 32)]],
        fontsize=7,
        rotation=90 if any(len(t) > 1 for t in labels) else 0,
    )
    axis.set(xlabel="token", ylabel="score", title=caption(title))
    axis.legend(fontsize=7)


def picture(image) -> np.ndarray:
    """Image (c y x) -> (y x 3) in [0, 1]."""
    image = _array(image)
    image = (image - image.min()) / max(float(image.max() - image.min()), 1e-12)
    return np.moveaxis(np.repeat(image[:1], 3, 0) if image.shape[0] < 3 else image[:3], 0, -1)


def overlay(figure, axis, image, scores, title: str) -> None:
    """Scores (rows columns) with the outline of an image (c y x); signed ones from blue over white to orange."""
    grey, scores = picture(image).mean(-1), _array(scores)
    limit = max(float(np.abs(scores).max()), 1e-12)
    signed = scores.min() < 0
    drawn = axis.imshow(
        scores,
        cmap="PuOr_r" if signed else "cividis",
        extent=(0, 1, 1, 0),
        interpolation="nearest",
        vmin=-limit if signed else 0,
        vmax=limit,
    )
    if grey.max() > grey.min():
        y, x = ((np.arange(n) + 0.5) / n for n in grey.shape)
        axis.contour(
            x, y, grey, levels=[(grey.min() + grey.max()) / 2], colors="black" if signed else "white", linewidths=1
        )
    axis.set(
        title=caption(title), xticks=[0, 1], yticks=[0, 1], xlabel="x (share of width)", ylabel="y (share of height)"
    )
    axis.title.set_fontsize(9)
    figure.colorbar(drawn, ax=axis, shrink=0.8, label="relevance" if signed else "weight")


def _array(values) -> np.ndarray:
    return values.detach().cpu().double().numpy() if isinstance(values, Tensor) else np.asarray(values, dtype=float)
