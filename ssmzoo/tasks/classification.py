"""Image classification: soft-target cross entropy, mixup and cutmix, top-1 and top-5, confusion, a prediction sheet."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmzoo.tasks.base import Report, StepOutput, Task

COUNTED = 200  # classes up to which a confusion matrix is kept


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over images of -sum_c targets_c log softmax(logits)_c; both (b c)."""
    return -(targets * F.log_softmax(logits.float(), dim=-1)).sum(-1).mean()


def smooth_targets(labels: Tensor, classes: int, smoothing: float) -> Tensor:
    """(b) -> (b classes): 1 - smoothing on the label, and smoothing / classes on every class."""
    return F.one_hot(labels, classes).float() * (1 - smoothing) + smoothing / classes


def mixing(mixup: float, cutmix: float, prob: float, switch_prob: float, smoothing: float, classes: int):
    """timm's Mixup of whole batches: (images, labels) -> (images, targets (b classes)); None if both are off."""
    if mixup <= 0 and cutmix <= 0:
        return None
    from timm.data import Mixup

    return Mixup(mixup, cutmix, prob=prob, switch_prob=switch_prob, label_smoothing=smoothing, num_classes=classes)


class ImageClassification(Task):
    """Cross entropy on mixed, smoothed targets in training; plain accuracy in validation.

    label_smoothing   share of the target spread over all classes
    mixup, cutmix     alpha of either (0: off);  mix_prob  how often a batch is mixed;  switch_prob  cutmix's share
    mesa, mesa_start  weight of the self-distillation from the averaged weights (Spatial-Mamba's MESA: cross entropy
                      with the softmax of their logits on the same batch), from this share of the run on
    mesa_decay        of that average, per optimiser step
    """

    unit, monitor, mode = "images", "top1", "max"

    def __init__(
        self,
        model: nn.Module,
        optim=None,
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        mix_prob: float = 1.0,
        switch_prob: float = 0.5,
        mesa: float = 0.0,
        mesa_start: float = 0.25,
        mesa_decay: float = 0.9999,
    ):
        super().__init__(model, optim)
        for name, value in (
            ("label_smoothing", label_smoothing),
            ("mix_prob", mix_prob),
            ("switch_prob", switch_prob),
            ("mesa_start", mesa_start),
            ("mesa_decay", mesa_decay),
        ):
            if not 0 <= value <= 1:
                raise ValueError(f"task.{name} = {value}; it must lie between 0 and 1")
        if getattr(model, "num_classes", 0) < 2:
            raise ValueError(
                f"classification needs a model with at least two classes, {type(model).__name__} has "
                f"{getattr(model, 'num_classes', 'no num_classes')}"
            )
        self.classes, self.label_smoothing = model.num_classes, label_smoothing
        self.mix = mixing(mixup, cutmix, mix_prob, switch_prob, label_smoothing, self.classes)
        self.mesa, self.mesa_start, self.mesa_decay = mesa, mesa_start, mesa_decay
        self.teacher = copy.deepcopy(model).requires_grad_(False).eval() if mesa > 0 else None
        self.confusion: Tensor | None = None

    def check_data(self, data) -> None:
        if "in_chans" not in data.sizes:
            raise ValueError(f"task=classification is for images, {type(data).__name__} has none; leave out task=")

    def step(self, batch, training: bool) -> StepOutput:
        images, labels = batch["image"], batch["label"]
        if labels.is_cpu:
            self._check_labels(labels)
        if not training:
            return self._measure(self.model(images), labels)
        if self.mix is not None and len(images) % 2 == 0:
            images, targets = self.mix(images, labels)
        else:
            targets = smooth_targets(labels, self.classes, self.label_smoothing)
        logits = self.model(images)
        loss = soft_cross_entropy(logits, targets)
        metrics = {"top1": (logits.argmax(-1) == labels).float().mean()} if self.mix is None else {}
        if self.teacher is not None and self._progress() >= self.mesa_start:
            with torch.no_grad():
                taught = self.teacher.eval()(images).float().softmax(-1)
            distilled = soft_cross_entropy(logits, taught)
            loss, metrics = loss + self.mesa * distilled, metrics | {"mesa": distilled.detach()}
        return StepOutput(loss, metrics, len(images))

    def transfer_batch_to_device(self, batch, device: torch.device, dataloader_idx: int):
        """Labels are looked at while they are here: a GPU would have to be waited for."""
        if device.type != "cpu" and batch["label"].is_cpu:
            self._check_labels(batch["label"])
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def _check_labels(self, labels: Tensor) -> None:
        if int(labels.max()) >= self.classes:
            raise ValueError(
                f"an image has label {int(labels.max())}, but the model has {self.classes} classes (0 to "
                f"{self.classes - 1}); build it with num_classes={int(labels.max()) + 1} or more"
            )

    def _measure(self, logits: Tensor, labels: Tensor) -> StepOutput:
        best = logits.topk(min(5, self.classes), dim=-1).indices  # (b 5)
        hit = best == labels[:, None]
        metrics = {"top1": hit[:, 0].float().mean()}
        if self.classes > 5:
            metrics["top5"] = hit.any(-1).float().mean()
        if self.classes <= COUNTED:
            pairs = torch.bincount(labels * self.classes + best[:, 0], minlength=self.classes**2)
            table = pairs.view(self.classes, self.classes)
            self.confusion = table if self.confusion is None else self.confusion + table
        return StepOutput(F.cross_entropy(logits.float(), labels), metrics, len(labels))

    def _progress(self) -> float:
        """Share of the run that is over."""
        total = self.trainer.estimated_stepping_batches
        return self.trainer.global_step / total if total and total != float("inf") else 1.0

    @torch.no_grad()
    def on_before_zero_grad(self, optimizer) -> None:
        """After every optimiser step: the teacher follows the student."""
        if self.teacher is None:
            return
        decay = min(self.mesa_decay, (1 + self.trainer.global_step) / (10 + self.trainer.global_step))
        for kept, new in zip(self.teacher.state_dict().values(), self.model.state_dict().values()):
            kept.lerp_(new, 1 - decay) if kept.is_floating_point() else kept.copy_(new)

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self.confusion = None

    def report(self, run_dir: Path, validation: dict[str, float]) -> Report:
        from ssmzoo.tasks.classification_figure import draw_confusion, draw_predictions

        data = self.trainer.datamodule
        rows = {"validation top-1": f"{100 * validation['top1']:.2f} %"}
        if "top5" in validation:
            rows["validation top-5"] = f"{100 * validation['top5']:.2f} %"
        rows["validation cross entropy"] = f"{validation['loss']:.4f} nats"
        linear = data.linear_baseline()
        if linear is not None:
            rows["linear classifier on pixels, top-1"] = f"{100 * linear:.2f} %"
        texts, figures = {}, [draw_predictions(self.model, data, run_dir / "predictions.png", self.device)]
        if self.confusion is not None:
            texts["most frequent confusions"] = confusions(self.confusion, data.classes)
            figures.append(draw_confusion(self.confusion, data.classes, run_dir / "confusion.png"))
        return Report(rows, texts, figures)

    def evaluate(self, out: Path, data) -> Report:
        """Accuracy per class as classes.csv."""
        if self.confusion is None:
            return Report({}, {}, [])
        table = self.confusion.double().cpu()
        lines = [
            f"{name},{int(row.sum())},{float(row[i] / row.sum().clamp(min=1)):.4f}"
            for i, (name, row) in enumerate(zip(data.classes, table))
        ]
        (out / "classes.csv").write_text("\n".join(["class,images,top1", *lines]) + "\n")
        worst = sorted(lines, key=lambda line: float(line.rsplit(",", 1)[1]))[:5]
        return Report({}, {"worst classes (name, images, top-1)": "\n".join(worst)}, [])


def confusions(table: Tensor, classes: list[str], top: int = 5) -> str:
    """The largest off-diagonal entries of a confusion matrix (true, predicted) in words."""
    wrong = table.clone().cpu()
    wrong.fill_diagonal_(0)
    order = wrong.flatten().argsort(descending=True)[:top].tolist()
    lines = [
        f"{classes[i // len(classes)]} taken for {classes[i % len(classes)]}: {int(wrong.flatten()[i])} times"
        for i in order
        if wrong.flatten()[i] > 0
    ]
    return "\n".join(lines) or "none"
