"""What every task shares: loss with auxiliary terms, exact averages over the validation set, one optimiser factory."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor, nn

from ssmzoo.tasks.accumulation import Shares
from ssmzoo.tasks.micro_batch import MicroBatches, is_out_of_memory


class StepOutput(NamedTuple):
    """loss is differentiated; metrics are means over `count` items of the batch (tokens, images, sequences).

    auxiliary   added to the loss as it is: terms that are no means over the items that `Task.labelled` counts
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    count: int | Tensor
    auxiliary: Tensor | None = None


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
        self.shares, self.micro_batches = Shares(), MicroBatches()
        self.expert_load: Tensor | None = None  # share of the last batch's tokens per expert, (layers e) or (e)
        self.trained_loss: Tensor | None = None
        self.gradient_norm: float | None = None  # of the update at hand, set by who measures it
        self._sums: dict[str, Tensor] = {}
        self._means: dict[str, Tensor] = {}
        self._row: dict[str, float] = {}
        self._clock: tuple[float, float | None] | None = None  # of the last row: time, and seconds waited for data
        self.measuring = True  # are this training step's metrics wanted? `step` may leave them out otherwise

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_current_fx_name":  # set by Lightning around every hook; what a module may hold is checked for all
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def step(self, batch: dict[str, Tensor], training: bool) -> StepOutput:
        raise NotImplementedError(f"{type(self).__name__} must define step(batch, training)")

    def items(self, batch: dict[str, Tensor]) -> int:
        """How many `unit`s a batch has."""
        return len(next(iter(batch.values())))

    def labelled(self, batch: dict[str, Tensor]) -> Tensor | None:
        """How many items the training loss is a mean over; None: as many in every batch of a run."""
        return None

    def training_step(self, batch, batch_idx: int) -> Tensor:
        self.measuring = self.log_is_due()
        weight = self.shares.of(self, batch, batch_idx)
        out = self.micro_batches.step(self, batch, batch_idx, weight)
        self.seen += self.items(batch)
        loss = self.weighted_loss(out, weight)
        self._log_training(loss, out.metrics, weight)
        return loss

    def weighted_loss(self, out: StepOutput, weight: Tensor | float) -> Tensor:
        """A micro-batch's part of the update's loss."""
        weight = weight.to(out.loss.dtype) if isinstance(weight, Tensor) else weight
        loss = out.loss if isinstance(weight, float) and weight == 1 else out.loss * weight
        return loss if out.auxiliary is None else loss + out.auxiliary * self.shares.filling

    def backward(self, loss: Tensor, *args, **kwargs) -> None:
        try:
            super().backward(loss, *args, **kwargs)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self.micro_batches.retry(self, loss, error)

    def _log_training(self, loss: Tensor, metrics: dict[str, Tensor], weight) -> None:
        """Means over the update's micro-batches and over all ranks, noted when a row of the loggers is due.

        `trained_loss` is this rank's part of the update's loss.
        """
        trainer, parts = self.trainer, self.trainer.accumulate_grad_batches
        if parts == 1 and not self.measuring:
            self.trained_loss = loss.detach()
            return
        plain = isinstance(weight, float) and weight == 1
        values = {"loss": loss.detach()} | {k: v if plain else v * weight for k, v in metrics.items()}
        if parts > 1:
            first = trainer.fit_loop.epoch_loop.batch_idx % parts == 0
            before = {} if first else self._means
            values = {k: v / parts + before.get(k, 0) for k, v in values.items()}
        self._means, self.trained_loss = values, values["loss"]
        if self.measuring and not trainer.fit_loop._should_accumulate():
            means = values if trainer.world_size == 1 else _mean_over_ranks(values, trainer)
            for name, value in means.items():
                self.note(f"train/{name}", float(value))

    def note(self, name: str, value: float) -> None:
        """Put a number into the row that the loggers get after this step; only when `measuring`.

        Lightning's `log` does more (epoch means, reductions) and takes a millisecond for every name.
        """
        self._row[name] = value
        self.trainer.callback_metrics[name] = torch.tensor(value, dtype=torch.float64)

    def on_train_batch_end(self, outputs, batch, batch_idx: int) -> None:
        if self._row:
            row, self._row = self._row, {}
            now, waited = time.perf_counter(), getattr(self.trainer.train_dataloader, "waited", None)
            if self._clock is not None and waited is not None:  # of the time since the last row
                row["time/data_wait"] = (waited - self._clock[1]) / (now - self._clock[0])
            self._clock = (now, waited)
            self.trainer._logger_connector.log_metrics(row)

    def gradients(self) -> list[Tensor]:
        """Of all parameters that the optimiser has and that got one."""
        groups = self.trainer.optimizers[0].param_groups
        return [p.grad for group in groups for p in group["params"] if p.grad is not None]

    def log_is_due(self) -> bool:
        """Do the loggers take a row at this step?"""
        return self.trainer._logger_connector.should_update_logs

    def _on_before_batch_transfer(self, batch, dataloader_idx: int = 0):
        """Lightning's way to three hooks that no task or data of ours has; asking who has them takes longer than a
        small model's optimiser."""
        return batch

    def _apply_batch_transfer_handler(self, batch, device=None, dataloader_idx: int = 0):
        on_cpu = device is not None and device.type == "cpu"  # what is there already is not walked through
        return batch if on_cpu else super()._apply_batch_transfer_handler(batch, device, dataloader_idx)

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        """Clip by the norm that is known already; by value as Lightning does."""
        by_norm = gradient_clip_algorithm in (None, "norm")
        if gradient_clip_val and by_norm and self.gradient_norm is not None:
            if not self.gradient_norm <= gradient_clip_val:
                torch._foreach_mul_(self.gradients(), gradient_clip_val / (self.gradient_norm + 1e-6))
        elif gradient_clip_val:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

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

    def configure_model(self) -> None:
        """Cut the model into shards where the strategy asks for it."""
        if hasattr(self.trainer.strategy, "shard"):
            self.trainer.strategy.shard(self.model)

    def configure_optimizers(self):
        return self.optim(self.model)

    def report(self, run_dir: Path, validation: dict[str, float]) -> Report:
        """Called once after training with the best weights loaded; `validation` holds their validation means."""
        return Report({f"validation {k}": f"{v:.4g}" for k, v in validation.items()}, {}, [])

    def evaluate(self, out: Path, data: L.LightningDataModule) -> Report:
        """What `eval.py` adds to the validation: tables and figures, written into `out`."""
        return Report({}, {}, [])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["task"] = {"seen": self.seen, "parts": self.micro_batches.parts}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.seen = checkpoint.get("task", {}).get("seen", 0)
        self.micro_batches.parts = checkpoint.get("task", {}).get("parts", 1)


def _mean_over_ranks(values: dict[str, Tensor], trainer) -> dict[str, Tensor]:
    """One reduction for all of them."""
    names = sorted(values)
    stacked = torch.stack([values[k].double().reshape(()) for k in names])
    return dict(zip(names, trainer.strategy.reduce(stacked, reduce_op="mean")))


Task.training_step.__signature__ = inspect.signature(Task.training_step)  # Lightning asks for it at every step
