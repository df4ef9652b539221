"""Graphs: classes or values of graphs, of nodes, or of pairs of nodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssmzoo.suggest import nearest
from ssmzoo.tasks.base import Report, StepOutput, Task
from ssmzoo.tasks.metrics.graphs import METRICS, SMALLER_IS_BETTER, measure
from ssmzoo.tasks.objectives.graphs import LOSSES, answered

CLASSES, VALUES = ("cross_entropy", "weighted_cross_entropy"), ("l1", "mse", "bce")


class GraphLearning(Task):
    """One loss over what the data asks of graphs, nodes or pairs of nodes, one metric exact over the validation set.

    loss     cross_entropy | weighted_cross_entropy (by class of the batch) | bce (several labels) | l1 | mse
    metric   accuracy | class_accuracy | macro_f1 | ap | mae | mrr; the best checkpoint has the best one

    The model maps a batch (tensors in PyTorch Geometric's names) to an output with logits and x.
    """

    unit = "graphs"

    def __init__(self, model: nn.Module, optim=None, loss: str = "cross_entropy", metric: str = "accuracy"):
        super().__init__(model, optim)
        for name, value, choices in (("loss", loss, LOSSES), ("metric", metric, METRICS)):
            if value not in choices:
                raise ValueError(
                    f"task.{name} is {value!r}{nearest(str(value), choices)}; choose one of {', '.join(choices)}"
                )
        if not hasattr(model, "level"):
            raise ValueError(
                f"the task graphs needs a model of graphs (`ssmzoo list models --task graphs`), "
                f"{type(model).__name__} is none"
            )
        self.loss, self.metric = loss, metric
        self.monitor, self.mode = metric, "min" if metric in SMALLER_IS_BETTER else "max"
        self.collected = measure(metric, model.num_classes)

    def check_data(self, data) -> None:
        if data.sizes.get("level", self.model.level) != self.model.level:
            raise ValueError(
                f"model.level is {self.model.level}, but the data asks about a {data.sizes['level']}: "
                f"leave model.level to the data, or set model.level={data.sizes['level']}"
            )
        batch = next(iter(data.val_dataloader()))
        y = batch["y"]
        if y.is_floating_point() != (self.loss in VALUES):
            fitting = VALUES if y.is_floating_point() else CLASSES
            what = "values" if y.is_floating_point() else "classes"
            raise ValueError(
                f"task.loss is {self.loss}, but the data's answers are {what}; choose {', '.join(fitting)}"
            )
        with torch.no_grad(), torch.random.fork_rng(devices=[]):  # widths and tensors that the model asks for
            training = self.model.training
            self.model.eval()(batch)
            self.model.train(training)

    def step(self, batch: dict[str, Any], training: bool) -> StepOutput:
        out = self.model(batch)
        y = batch["y"]
        if not y.is_floating_point() and len(y) and int(y.max()) >= self.model.num_classes:
            raise ValueError(
                f"y holds class {int(y.max())}, but the model has {self.model.num_classes} classes (0 to "
                f"{self.model.num_classes - 1}); build it with num_classes={int(y.max()) + 1} or more"
            )
        loss = LOSSES[self.loss](out.logits, y)
        metrics: dict[str, Tensor] = {}
        if not training:
            self.collected.add(out, batch)
        elif self.measuring and self.metric == "accuracy":
            asked = y >= 0
            metrics["accuracy"] = (out.logits.argmax(-1) == y)[asked].float().mean()
        return StepOutput(loss, metrics, answered(y))

    def items(self, batch: dict[str, Any]) -> int:
        return batch["num_graphs"]

    def labelled(self, batch: dict[str, Any]) -> Tensor:
        return answered(batch["y"])

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self.collected = measure(self.metric, self.model.num_classes)

    def derived(self, means: dict[str, float]) -> dict[str, float]:
        return means | {self.metric: self._collected_everywhere().value()}

    def _collected_everywhere(self):
        """Over all ranks."""
        if self.trainer.world_size == 1:
            return self.collected
        found = [None] * self.trainer.world_size
        torch.distributed.all_gather_object(found, self.collected)
        for other in found[1:]:
            found[0].merge(other)
        return found[0]

    def report(self, run_dir: Path, validation: dict[str, float]) -> Report:
        from ssmzoo.tasks.graphs_figure import draw_graphs

        data = self.trainer.datamodule
        rows = {
            f"validation {self.metric}": shown(self.metric, validation[self.metric]),
            f"validation {self.loss}": f"{validation['loss']:.4f}",
        }
        rows |= {f"{self.metric}, {what}": shown(self.metric, value) for what, value in data.baselines().items()}
        figure = draw_graphs(self.model, data, run_dir / "graphs.png", self.device)
        return Report(rows, {}, [figure])

    @torch.no_grad()
    def evaluate(self, out: Path, data) -> Report:
        """The metric on the test part, where the set has one."""
        batches = data.held_out()
        if batches is None:
            return Report({}, {}, [])
        found, was_training = measure(self.metric, self.model.num_classes), self.model.training
        self.model.eval()
        for batch in batches:
            batch = self.transfer_batch_to_device(batch, self.device, 0)
            found.add(self.model(batch), batch)
        self.model.train(was_training)
        return Report({f"test {self.metric}": shown(self.metric, found.value())}, {}, [])


def shown(metric: str, value: float) -> str:
    return f"{value:.4f}" if metric in ("mae", "mrr") else f"{100 * value:.2f} %"
