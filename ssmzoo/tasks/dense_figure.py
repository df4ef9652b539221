"""Pictures of dense predictions beside the truth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from ssmzoo.inference.overlay import blended, box_lines, class_colours
from ssmzoo.terminal import caption


def draw_segmentation(shown: list[tuple[Tensor, Tensor, Tensor]], classes: Sequence[str], png: Path) -> Path:
    """Columns: picture (3 y x) in [0, 1], true and predicted classes (y x) over it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    colours = class_colours(len(classes))
    figure, axes = plt.subplots(
        len(shown), 3, figsize=(7.5, 2.2 * len(shown) + 0.6), squeeze=False, layout="constrained"
    )
    for row, (image, truth, predicted) in zip(axes, shown):
        levels = (image * 255).byte().permute(1, 2, 0).numpy()
        pictures = (levels, blended(levels, truth.numpy(), colours), blended(levels, predicted.numpy(), colours))
        for axis, picture, title in zip(row, pictures, ("picture", "truth", "prediction")):
            axis.imshow(picture)
            axis.axis("off")
            axis.set_title(title, fontsize=8)
    present = sorted({int(c) for _, t, p in shown for m in (t, p) for c in m.unique() if c > 0})[:20]
    handles = [Patch(color=colours[c] / 255, label=caption(classes[c])[:24]) for c in present]
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=min(10, len(handles)), fontsize=7)
    figure.savefig(png, dpi=110)
    plt.close(figure)
    return png


def draw_detection(shown: list[tuple[Tensor, dict, dict]], classes: Sequence[str], png: Path) -> Path:
    """Columns: picture (3 y x) in [0, 1] with true objects, and with those that were found (boxes, labels, scores)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = class_colours(len(classes) + 1)
    columns = 3
    rows = -(-len(shown) // columns)
    figure, axes = plt.subplots(rows, 2 * columns, figsize=(12, 2.2 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for i, (image, truth, found) in enumerate(shown):
        pair = axes[i // columns, 2 * (i % columns) : 2 * (i % columns) + 2]
        for axis, objects, title in zip(pair, (truth, found), ("truth", "prediction")):
            axis.imshow((image * 255).byte().permute(1, 2, 0).numpy())
            axis.set_title(title, fontsize=8)
            box_lines(axis, objects, classes, colours)
    figure.savefig(png, dpi=110)
    plt.close(figure)
    return png
