"""Masks and boxes drawn over pictures."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np

from ssmzoo.terminal import caption


def class_colours(count: int) -> np.ndarray:
    """(count 3) uint8, hues a golden section apart; class 0, the background, is grey."""
    colours = [(0.5, 0.5, 0.5)]
    colours += [colorsys.hsv_to_rgb(i * 0.618034 % 1, 0.85, 1.0 if i % 2 else 0.8) for i in range(1, count)]
    return (np.array(colours[:count]) * 255).round().astype(np.uint8)


def blended(levels: np.ndarray, classes: np.ndarray, colours: np.ndarray, opacity: float = 0.55) -> np.ndarray:
    """(y x 3) uint8: classes (y x) over a picture; class 0 and what is negative leave it as it is."""
    shown = (classes > 0)[..., None]
    over = colours[np.maximum(classes, 0)]
    return np.where(shown, levels * (1 - opacity) + over * opacity, levels).round().astype(np.uint8)


def box_lines(axis, objects: dict, classes: Sequence[str], colours: np.ndarray) -> None:
    """Boxes (n 4), labels (n) from 0 and, if given, scores (n) and masks (n y x) on axes of matplotlib."""
    from matplotlib.patches import Rectangle

    scores = objects.get("scores")
    for i, (box, label) in enumerate(zip(objects["boxes"].tolist(), objects["labels"].tolist())):
        colour = colours[label + 1] / 255
        axis.add_patch(Rectangle(box[:2], box[2] - box[0], box[3] - box[1], fill=False, color=colour, linewidth=1.2))
        name = classes[label] if label < len(classes) else str(label)
        words = f"{name} {100 * float(scores[i]):.0f}" if scores is not None else name
        axis.text(box[0], box[1] - 1, caption(words), fontsize=6, color="black", backgroundcolor=(*colour, 0.75))
        if "masks" in objects and len(objects["masks"]):
            axis.contour(np.asarray(objects["masks"][i]) > 0.5, [0.5], colors=[colour], linewidths=0.8)
