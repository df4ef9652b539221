"""The picture of answered questions: held-out pictures, what was asked, what was said."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ssmzoo.terminal import caption


def draw_questions(png: Path, pictures: np.ndarray, asked: list, said: list[str]) -> Path:
    """pictures (n y x c) in [0, 1]; asked: picture, question, answer; said: what the model wrote. Returns `png`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = list(dict.fromkeys(a.picture for a in asked))
    columns = min(5, len(shown))
    rows = -(-len(shown) // columns)
    lines = max(sum(a.picture == i for a in asked) for i in shown)
    size = (2.5 * columns, (1.7 + 0.22 * lines) * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
    figure.subplots_adjust(0.02, 0.28 * lines / size[1], 0.98, 0.98, wspace=0.1, hspace=0.1 + 0.15 * lines)
    for ax in axes.flat:
        ax.axis("off")
    for ax, picture in zip(axes.flat, shown):
        levels = pictures[picture]
        ax.imshow(levels[..., 0] if levels.shape[-1] == 1 else levels, cmap="gray_r", vmin=0, vmax=1)
        for row, (a, answer) in enumerate((a, s) for a, s in zip(asked, said) if a.picture == picture):
            right = answer == a.answer
            text = f"{a.question} {plain(answer) or '-'}" + ("" if right else f" ({plain(a.answer)})")
            place = {"xy": (0.5, -0.04 - 0.13 * row), "xycoords": "axes fraction", "annotation_clip": False}
            color = "#20603a" if right else "#c23b22"
            ax.annotate(caption(text), **place, ha="center", va="top", fontsize=8, color=color)
    figure.savefig(png, dpi=110)
    plt.close(figure)
    return png


def plain(answer: str, most: int = 20) -> str:
    """What an untrained model writes may be any bytes: those that a font has, and not too many."""
    shown = "".join(c if c.isprintable() and ord(c) < 0x250 else "?" for c in answer)
    return shown if len(shown) <= most else f"{shown[:most]} ..."
