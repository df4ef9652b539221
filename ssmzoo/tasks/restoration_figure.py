"""The side-by-side picture of a restoration run: degraded, restored, truth, error map."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from ssmzoo.tasks.metrics.image import luma
from ssmzoo.terminal import caption


def _levels(image: Tensor):
    """(c y x) uint8 to an array matplotlib shows: (y x 3) or (y x)."""
    array = image.permute(1, 2, 0).numpy()
    return array[..., 0] if array.shape[-1] == 1 else array


def draw_comparison(pictures, png: Path) -> Path:
    """One row per picture with fields name, degraded, restored, truth (8-bit levels, c y x); returns `png`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        len(pictures), 4, figsize=(13, 3.3 * len(pictures)), squeeze=False, constrained_layout=True
    )
    for row, picture in zip(axes, pictures):
        for ax, image, title in zip(row, picture[1:], ("degraded", "restored", "truth")):
            ax.imshow(_levels(image), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            ax.set_title(f"{caption(picture.name)}: {title} ({image.shape[1]} x {image.shape[2]})", fontsize=9)
        error = (luma(picture.restored).double() - luma(picture.truth).double()).abs()[0].numpy()
        shown = row[3].imshow(error, cmap="magma", vmin=0, vmax=max(1.0, float(error.max())))
        row[3].set_title("|error| in luma levels", fontsize=9)
        figure.colorbar(shown, ax=row[3], shrink=0.8)
        for ax in row:
            ax.set_axis_off()
    figure.savefig(png, dpi=110)
    plt.close(figure)
    return png
