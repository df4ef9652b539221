"""Object detection: any image backbone of the zoo under RetinaNet or Mask R-CNN, COCO's average precision."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ssmzoo.models.detector import Detector
from ssmzoo.tasks.base import Report, StepOutput, Task
from ssmzoo.tasks.dense_network import dense_network
from ssmzoo.tasks.metrics.detection import average_precision, coco_backend

SHOWN = 9  # pictures in the figure
SHOWN_SCORE = 0.3  # boxes below stay out of it


class ObjectDetection(Task):
    """The sum of the network's losses; AP of boxes, and of masks with Mask R-CNN, over the validation set.

    head, channels, min_stride, extra_levels, anchor_scale, min_size, max_size, results, out_indices, tap
                                           of the network, see `Detector`
    """

    unit, monitor, mode = "images", "box_ap", "max"
    default_data = "digit_objects"
    network_arguments = (
        *("head", "channels", "min_stride", "extra_levels", "anchor_scale", "min_size", "max_size"),
        *("results", "out_indices", "tap"),
    )

    def __init__(
        self,
        model: nn.Module,
        optim=None,
        head: str = "retinanet",
        channels: int = 256,
        min_stride: int | None = None,
        extra_levels: int | None = None,
        anchor_scale: float | None = None,
        min_size: int | list[int] = 800,
        max_size: int = 1333,
        results: dict[str, float] | None = None,
        out_indices: list[int] | None = None,
        tap: str = "stream",
    ):
        super().__init__(model, optim)
        if not isinstance(model, Detector):
            raise ValueError(f"task=detection needs a Detector, not {type(model).__name__}")
        self.kinds = ("bbox", "segm") if head == "mask_rcnn" else ("bbox",)
        self.results: list[tuple[dict, dict]] = []  # (found, truth) of every validation picture
        self.precision: dict[str, dict] = {}

    @classmethod
    def network(cls, node: dict, task: dict, sizes: dict[str, int]) -> dict:
        """The configuration of the network to train, from that of a backbone."""
        return dense_network(Detector, node, {k: task[k] for k in cls.network_arguments if k in task}, sizes)

    def check_data(self, data) -> None:
        if getattr(data, "semantic", True):
            raise ValueError(
                f"task=detection needs objects with boxes, which {type(data).__name__} has not; choose "
                f"data=digit_objects or coco"
            )

    def step(self, batch, training: bool) -> StepOutput:
        images, targets = batch["image"], batch["target"]
        if training:
            losses = self.model(images, targets)
            return StepOutput(sum(losses.values()), {k: v.detach() for k, v in losses.items()}, len(images))
        losses = self.model.losses(images, [without_crowds(t) for t in targets])
        self.results += list(zip(map(self.on_cpu, self.model(images)), map(self.on_cpu, targets)))
        return StepOutput(sum(losses.values()), {}, len(images))

    def on_cpu(self, objects: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the metric needs; masks as booleans, and none where they are not measured."""
        kept = {
            k: v.detach().cpu()
            for k, v in objects.items()
            if k != "masks" or "segm" in self.kinds or "crowd" in objects
        }
        return kept | ({"masks": kept["masks"] > 0.5} if "masks" in kept else {})

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self.results = []

    def derived(self, means: dict[str, float]) -> dict[str, float]:
        results = self.results
        if self.trainer.world_size > 1:
            gathered: list = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(gathered, results)
            results = [pair for part in gathered for pair in part]
        found, truth = zip(*results)
        self.precision = {kind: average_precision(found, truth, kind) for kind in self.kinds}
        named = {"bbox": "box", "segm": "mask"}
        for kind, values in self.precision.items():
            means |= {f"{named[kind]}_ap": nan_as_0(values["map"]), f"{named[kind]}_ap50": nan_as_0(values["map_50"])}
        return means

    def report(self, run_dir: Path, validation: dict[str, float]) -> Report:
        from ssmzoo.tasks.dense_figure import draw_detection
        from ssmzoo.tasks.detection_baseline import blob_detector

        data, rows = self.trainer.datamodule, {}
        for kind, name in (("bbox", "box"), ("segm", "mask")):
            if found := self.precision.get(kind):
                rows[f"validation {name} AP"] = f"{100 * found['map']:.2f}"
                rows[f"validation {name} AP50, AP75"] = f"{100 * found['map_50']:.2f}, {100 * found['map_75']:.2f}"
        rows["AP by"] = {"own": "own code after COCO's definition"}.get(coco_backend(), coco_backend())
        baseline = blob_detector(data)
        if baseline is not None:
            rows["blob detector with a linear classifier, box AP"] = f"{100 * baseline['map']:.2f}"
            rows["blob detector with a linear classifier, box AP50"] = f"{100 * baseline['map_50']:.2f}"
        figure = draw_detection(self.shown(data), data.classes, run_dir / "overlays.png")
        return Report(rows, {"AP per class": self.per_class(data.classes)}, [figure])

    @torch.no_grad()
    def shown(self, data) -> list[tuple[Tensor, dict, dict]]:
        """(picture, true objects, found objects) of the first validation pictures."""
        shown, was_training = [], self.model.training
        self.model.eval()
        for batch in data.val_dataloader():
            for image, truth, found in zip(
                batch["image"], batch["target"], self.model([i.to(self.device) for i in batch["image"]])
            ):
                keep = found["scores"] > SHOWN_SCORE
                shown.append((image, truth, {k: v[keep].cpu() for k, v in found.items()}))
            if len(shown) >= SHOWN:
                break
        self.model.train(was_training)
        return shown[:SHOWN]

    def per_class(self, classes: list[str], most: int = 40) -> str:
        values = self.precision["bbox"]["per_class"]
        named = [(classes[c], 100 * v) for c, v in values.items()]
        lines = [f"{name:<24}{'-' if v != v else f'{v:.2f}':>8}" for name, v in named]
        return "\n".join(lines[:most] + ["..."] * (len(lines) > most))

    def evaluate(self, out: Path, data) -> Report:
        """AP per class as classes.csv; a row for every range of sizes."""
        values = self.precision["bbox"]["per_class"]
        lines = [f"{data.classes[c]},{'' if v != v else f'{v:.6f}'}" for c, v in values.items()]
        (out / "classes.csv").write_text("\n".join(["class,box_ap", *lines]) + "\n", encoding="utf-8")
        rows = {"per class": str(out / "classes.csv")}
        for kind, found in self.precision.items():
            sizes = ", ".join(f"{100 * found[f'map_{s}']:.2f}" for s in ("small", "medium", "large"))
            rows[f"{kind} AP of small, medium, large objects"] = sizes
        return Report(rows, {}, [])


def without_crowds(target: dict) -> dict:
    return {k: v[~target["crowd"]] for k, v in target.items()} if "crowd" in target else target


def nan_as_0(value: float) -> float:
    """Without a single object nothing was found."""
    return 0.0 if value != value else value
