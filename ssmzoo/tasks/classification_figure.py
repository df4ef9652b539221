"""Pictures of a classifier's results: a sheet of predictions (mistakes first) and the confusion matrix."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ssmzoo.terminal import caption


@torch.no_grad()
def draw_predictions(model: nn.Module, data, png: Path, device, rows: int = 4, columns: int = 8) -> Path:
    """Validation images with prediction and confidence, mistakes first and in red."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    was_training, found = model.training, []
    model.eval()
    for count, batch in enumerate(data.val_dataloader()):
        share = model(batch["image"].to(device)).float().softmax(-1).cpu()
        confidence, predicted = share.max(-1)
        found += list(
            zip(
                (predicted == batch["label"]).tolist(),
                confidence.tolist(),
                predicted.tolist(),
                batch["label"].tolist(),
                data.levels(batch["image"]),
            )
        )
        if count == 15:
            break
    model.train(was_training)
    found.sort(key=lambda item: (item[0], item[1]))
    figure, axes = plt.subplots(rows, columns, figsize=(1.5 * columns, 1.7 * rows), constrained_layout=True)
    for axis in axes.flat:
        axis.axis("off")
    for axis, (right, confidence, predicted, label, image) in zip(axes.flat, found):
        axis.imshow(image.permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1)
        words = f"{data.classes[predicted]} {100 * confidence:.0f} %"
        axis.set_title(
            caption(words if right else f"{words}\nis {data.classes[label]}"),
            fontsize=8,
            color="black" if right else "#D55E00",
        )
    wrong = sum(not item[0] for item in found)
    figure.suptitle(f"least certain of {len(found)} validation images; {wrong} wrong (red), these first", fontsize=10)
    figure.savefig(png, dpi=120)
    plt.close(figure)
    return png


def draw_confusion(table: Tensor, classes: list[str], png: Path) -> Path:
    """Shares of every true class by prediction."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    share = (table.double() / table.sum(1, keepdim=True).clamp(min=1)).cpu().numpy()
    side = min(14.0, 3 + 0.3 * len(classes))
    figure, axes = plt.subplots(figsize=(side, side), constrained_layout=True)
    drawn = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="predicted", ylabel="true", title="confusion (share of the true class)")
    if len(classes) <= 40:
        classes = [caption(name) for name in classes]
        axes.set_xticks(range(len(classes)), classes, rotation=90, fontsize=7)
        axes.set_yticks(range(len(classes)), classes, fontsize=7)
    figure.colorbar(drawn, shrink=0.7)
    figure.savefig(png, dpi=120)
    plt.close(figure)
    return png
