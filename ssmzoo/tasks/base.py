"""What every task shares: loss with auxiliary terms, exact averages over the validation set, one optimiser factory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor, nn


class StepOutput(NamedTuple):
    """loss is differentiated; metrics are means over `count` items of the batch (tokens, images, sequences)."""

    loss: Tensor
    metrics: dict[str, Tensor]
    count: int | Tensor


class Report(NamedTuple):
    """What a finished run tells its user: a table, texts (title -> body) and pictures already written."""

    rows: dict[str, str]
    texts: dict[str, str]
    figures: list[Path]


class Task(L.LightningModule):
    """A thin shell around a model: a batch goes in, a loss and metrics come out.

    model   the network; it does not know what it is trained for
    optim   `optim(model)` returns what `configure_optimizers` returns
    Subclasses define `step(batch, training) -> StepOutput`, `unit`, `monitor` (logged as `val/<monitor>`) and `mode`,
    and may add to `report`.
    """

    unit = "samples"  # what throughput is counted in
    monitor, mode = "loss", "min"

    def __init__(self, model: nn.Module, optim: Callable[[nn.Module], Any] | None = None):
        super().__init__()
        self.model, self.optim = model, optim
        self.seen = 0  # items trained on by this rank, for throughput and the report
        self._sums: dict[str, Tensor] = {}

    def step(self, batch: dict[str, Tensor], training: bool) -> StepOutput:
        raise NotImplementedError(f"{type(self).__name__} must define step(batch, training)")

    def training_step(self, batch, batch_idx: int) -> Tensor:
        out = self.step(batch, training=True)
        self.seen += int(out.count)
        self.log_dict(
            {f"train/{k}": v for k, v in ({"loss": out.loss.detach()} | out.metrics).items()},
            sync_dist=self.trainer.world_size > 1,
        )
        return out.loss

    def on_validation_epoch_start(self) -> None:
        self._sums = {}

    def validation_step(self, batch, batch_idx: int) -> None:
        out = self.step(batch, training=False)
        count = torch.as_tensor(out.count, dtype=torch.float64, device=out.loss.device)
        for key, value in ({"loss": out.loss} | out.metrics).items():
            item = torch.stack([torch.as_tensor(value, device=count.device).double() * count, count])
            self._sums[key] = self._sums[key] + item if key in self._sums else item

    def on_validation_epoch_end(self) -> None:
        self.log_dict({f"val/{k}": v for k, v in self.validation_means().items()})

    def validation_means(self) -> dict[str, float]:
        """Means over all items of the validation set and over all ranks."""
        sums = {k: self.trainer.strategy.reduce(v, reduce_op="sum") for k, v in sorted(self._sums.items())}
        return self.derived({k: (v[0] / v[1].clamp(min=1)).item() for k, v in sums.items()})

    def derived(self, means: dict[str, float]) -> dict[str, float]:
        """Add metrics that are functions of means (perplexity, bits per byte)."""
        return means

    def configure_optimizers(self):
        return self.optim(self.model)

    def report(self, run_dir: Path, validation: dict[str, float]) -> Report:
        """Called once after training with the best weights loaded; `validation` holds their validation means."""
        return Report({f"validation {k}": f"{v:.4g}" for k, v in validation.items()}, {}, [])

    def evaluate(self, out: Path, data: L.LightningDataModule) -> Report:
        """What `eval.py` adds to the validation: tables and figures, written into `out`."""
        return Report({}, {}, [])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["task"] = {"seen": self.seen}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.seen = checkpoint.get("task", {}).get("seen", 0)
