"""Semantic segmentation: any image backbone of the zoo under UPerNet or a linear head, mIoU and pixel accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmzoo.inference.segment import class_scores
from ssmzoo.models.segmenter import Segmenter, resized
from ssmzoo.tasks.base import Report, StepOutput, Task
from ssmzoo.tasks.dense_network import dense_network
from ssmzoo.tasks.metrics.segmentation import IGNORED, class_iou, confusion, scores

SHOWN = 6  # pictures in the figure


class SemanticSegmentation(Task):
    """Cross entropy per pixel, over all pixels of a batch (ignored ones count as 0), as in the published recipes.

    head, channels, auxiliary, drop_rate, out_indices, tap   of the network, see `Segmenter`
    auxiliary_weight  of the auxiliary head's loss
    slide             [crop, stride] in pixels: evaluate in windows that slide; None: whole pictures
    scales, flip      evaluate at several scales, and on mirror images, too
    """

    unit, monitor, mode = "images", "miou", "max"
    default_data = "digit_scenes"
    network_arguments = ("head", "channels", "auxiliary", "drop_rate", "out_indices", "tap")

    def __init__(
        self,
        model: nn.Module,
        optim=None,
        head: str = "upernet",
        channels: int = 512,
        auxiliary: int = 256,
        drop_rate: float = 0.1,
        out_indices: list[int] | None = None,
        tap: str = "stream",
        auxiliary_weight: float = 0.4,
        slide: list[int] | None = None,
        scales: list[float] | None = None,
        flip: bool = False,
    ):
        super().__init__(model, optim)
        if not isinstance(model, Segmenter):
            raise ValueError(f"task=segmentation needs a Segmenter, not {type(model).__name__}")
        if slide is not None and (len(slide) != 2 or not 0 < slide[1] <= slide[0]):
            raise ValueError(f"task.slide = {slide}; give [crop, stride] in pixels, the stride no larger than the crop")
        if scales is not None and (not scales or min(scales) <= 0):
            raise ValueError(f"task.scales = {scales}; give positive factors, e.g. [0.75, 1.0, 1.25]")
        self.auxiliary_weight, self.classes = auxiliary_weight, model.num_classes
        self.evaluation = {"window": slide, "scales": scales or [1.0], "flip": flip}
        self.table: Tensor | None = None  # confusion of the last validation
        self.met = torch.zeros(self.classes, dtype=torch.bool)  # classes that training has seen

    @classmethod
    def network(cls, node: dict, task: dict, sizes: dict[str, int]) -> dict:
        """The configuration of the network to train, from that of a backbone."""
        return dense_network(Segmenter, node, {k: task[k] for k in cls.network_arguments if k in task}, sizes)

    def check_data(self, data) -> None:
        if not getattr(data, "semantic", False):
            raise ValueError(
                f"task=segmentation needs a class for every pixel, which {type(data).__name__} has not; choose "
                f"data=digit_scenes, mask_folder or ade20k"
            )

    def step(self, batch, training: bool) -> StepOutput:
        images, classes = batch["image"], batch["classes"]
        if not training:
            return self._measure(images, classes)
        if self.measuring:
            self.met[classes[classes != IGNORED].unique().cpu()] = True
        out = self.model(images)
        loss = pixel_loss(out.logits, classes)
        if out.auxiliary is not None:
            loss = loss + self.auxiliary_weight * pixel_loss(out.auxiliary, classes)
        return StepOutput(loss, {}, len(images))

    def _measure(self, images: Tensor, classes: Tensor) -> StepOutput:
        found = class_scores(self.model, images, classes.shape[1:], **self.evaluation)
        table = confusion(found.argmax(1), classes, self.classes, IGNORED)
        self.table = table if self.table is None else self.table + table
        probabilities = self.evaluation["scales"] != [1.0] or self.evaluation["flip"]
        log = found.float().clamp(min=1e-12).log() if probabilities else F.log_softmax(found.float(), 1)
        return StepOutput(
            F.nll_loss(log, classes, ignore_index=IGNORED, reduction="sum") / classes.numel(), {}, len(images)
        )

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self.table = None

    def derived(self, means: dict[str, float]) -> dict[str, float]:
        self.table = self.trainer.strategy.reduce(self.table, reduce_op="sum")
        return means | scores(self.table)

    def report(self, run_dir: Path, validation: dict[str, float]) -> Report:
        from ssmzoo.tasks.dense_figure import draw_segmentation
        from ssmzoo.tasks.segmentation_baseline import linear_pixels

        data, evaluation = self.trainer.datamodule, self.evaluation
        rows = {
            "validation mIoU": f"{100 * validation['miou']:.2f} %",
            "validation pixel accuracy": f"{100 * validation['pixel_accuracy']:.2f} %",
        }
        baseline = linear_pixels(data)
        if baseline is not None:
            rows["linear classifier on 5x5 pixels, mIoU"] = f"{100 * baseline['miou']:.2f} %"
            rows["linear classifier on 5x5 pixels, pixel accuracy"] = f"{100 * baseline['pixel_accuracy']:.2f} %"
        if evaluation["window"] or evaluation["flip"] or evaluation["scales"] != [1.0]:
            rows["evaluated"] = (
                f"windows {evaluation['window']}, scales {evaluation['scales']}, flip {evaluation['flip']}"
            )
        unseen = [name for name, met in zip(data.classes, self.met) if not met]
        if self.met.any() and unseen:
            rows["classes that no training batch looked at had"] = ", ".join(unseen[:10])
        shown = self.shown(data)
        figure = draw_segmentation(shown, data.classes, run_dir / "overlays.png")
        return Report(rows, {"IoU per class": self.per_class(data.classes)}, [figure])

    @torch.no_grad()
    def shown(self, data) -> list[tuple[Tensor, Tensor, Tensor]]:
        """(picture in [0, 1], true, predicted classes) of the first validation pictures."""
        found, was_training = [], self.model.training
        self.model.eval()
        for batch in data.val_dataloader():
            predicted = class_scores(
                self.model, batch["image"].to(self.device), batch["classes"].shape[1:], **self.evaluation
            )
            levels = resized(data.levels(batch["image"]), batch["classes"].shape[1:])
            found += list(zip(levels, batch["classes"], predicted.argmax(1).cpu()))
            if len(found) >= SHOWN:
                break
        self.model.train(was_training)
        return found[:SHOWN]

    def per_class(self, classes: Sequence[str], most: int = 40) -> str:
        iou = class_iou(self.table).tolist()
        lines = [f"{name:<24}{'-' if v != v else f'{100 * v:.2f} %':>10}" for name, v in zip(classes, iou)]
        return "\n".join(lines[:most] + ["..."] * (len(lines) > most))

    def evaluate(self, out: Path, data) -> Report:
        """IoU and pixels per class as classes.csv."""
        iou, pixels = class_iou(self.table).tolist(), self.table.sum(1).tolist()
        lines = [f"{name},{n},{'' if v != v else f'{v:.6f}'}" for name, n, v in zip(data.classes, pixels, iou)]
        (out / "classes.csv").write_text("\n".join(["class,pixels,iou", *lines]) + "\n", encoding="utf-8")
        return Report({"per class": str(out / "classes.csv")}, {}, [])


def pixel_loss(logits: Tensor, classes: Tensor) -> Tensor:
    """Cross entropy of (b k y' x') against classes (b y x), summed over labelled pixels and divided by all of them."""
    logits = resized(logits.float(), classes.shape[1:])
    return F.cross_entropy(logits, classes, ignore_index=IGNORED, reduction="sum") / classes.numel()
