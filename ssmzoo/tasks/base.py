"""What every task shares: loss with auxiliary terms, exact averages over the validation set, one optimiser factory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor, nn

from ssmzoo.tasks.accumulation import Update, count_choices, routers_of, update_is_complete
from ssmzoo.tasks.micro_batch import halve, is_out_of_memory, step_in_parts


class StepOutput(NamedTuple):
    """loss is differentiated; metrics are means over `count` items of the batch (tokens, images, sequences).

    auxiliary   added to the loss as it is: terms that are no means over the items that `Task.labelled` counts
    losses      by name: each is back-propagated by itself and the gradients add up; loss is then their sum, for rows
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    count: int | Tensor
    auxiliary: Tensor | None = None
    losses: dict[str, Tensor] | None = None


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
        self.measuring = True  # are this training step's metrics wanted? `step` may leave them out otherwise
        self.row: dict[str, float] = {}  # numbers of this step for the loggers, see `note`
        self.validation: dict[str, float] = {}  # of the last validation, by the loggers' names
        self.trained_loss: Tensor | None = None  # this rank's part of the loss of the update at hand
        self.gradient_norm: float | None = None  # of the update at hand, set by who measures it
        self.expert_load: Tensor | None = None  # share of the last batch's tokens per expert, (layers e) or (e)
        self.halve_batch, self.parts = False, 1  # when memory runs out: allowed?, parts that a batch is computed in
        self._update = Update()
        self._losses: list[Tensor] = []  # parts of this micro-batch's loss that wait for backward passes of their own
        self._factor: Tensor | None = None  # the leaf whose gradient they get
        self._micro_batches: list[tuple[dict[str, Tensor], Tensor | float]] = []  # of this update, with their weights
        self._sums: dict[str, Tensor] = {}
        self._means: dict[str, Tensor] = {}

    def __setattr__(self, name: str, value: Any) -> None:
        """Lightning notes the hook at work forty times a step; nn.Module looks for parameters and modules first."""
        if name == "_current_fx_name":
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    def step(self, batch: dict[str, Tensor], training: bool) -> StepOutput:
        raise NotImplementedError(f"{type(self).__name__} must define step(batch, training)")

    def check_data(self, data: L.LightningDataModule) -> None:
        """Raise ValueError for data that do not go with the task's settings; called once, before anything runs."""

    def items(self, batch: dict[str, Tensor]) -> int:
        """How many `unit`s a batch has."""
        return len(next(iter(batch.values())))

    def labelled(self, batch: dict[str, Tensor]) -> Tensor | None:
        """How many items the training loss is a mean over; None: as many in every batch of a run."""
        return None

    def training_step(self, batch, batch_idx: int) -> Tensor:
        """The loss of one micro-batch. What happens around it in a training step, in order; `Trainer` is Lightning's:

        Trainer     next(loader), transfer_batch_to_device
        callbacks   on_train_batch_start: random states after a resume (train/callbacks.py)
        here        training_step: what the micro-batch counts in its update, `step`, its part of the loss
        here        backward: gradients; when memory runs out, again in smaller parts
        and after the update's last micro-batch (the k-th of accumulate_grad_batches):
        callbacks   on_before_optimizer_step: gradient norm, refuse NaN (train/guards.py)
        here        configure_gradient_clipping
        Trainer     optimizer.step, lr_scheduler.step, zero_grad (train/optim.py made the first two)
        callbacks   on_train_batch_end: guards, progress, the row of the loggers (train/rows.py), checkpoint, stop
        here        validation_step for each batch, when one is due
        """
        trainer, k = self.trainer, self.trainer.accumulate_grad_batches
        self.measuring = (trainer.global_step + 1) % trainer.log_every_n_steps == 0
        whole = k * trainer.world_size  # micro-batches of an update, on all ranks
        if whole > 1 and (batch_idx % k == 0 or self._update.parts != whole):
            self._update = self.begin_update(batch, batch_idx)
        weight = self.weight(batch, batch_idx % k)
        if self.halve_batch:
            self._micro_batches = [*self._micro_batches[: batch_idx % k], (batch, weight)]
        out = self.step_that_fits(batch)
        loss = self.weighted_loss(out, weight)
        self.seen += self.items(batch)
        self.note_training(loss, out.metrics, weight)
        return loss

    def begin_update(self, batch, batch_idx: int) -> Update:
        """Look at all micro-batches of the update that begins with this one."""
        trainer, k = self.trainer, self.trainer.accumulate_grad_batches
        size = int(min(k - batch_idx % k, trainer.num_training_batches - batch_idx))  # of an epoch; may be infinite
        own, batches = self.labelled(batch), [batch]
        routers = routers_of(self.model) if k > 1 else ()
        if k > 1 and (own is not None or routers):
            batches += trainer.train_dataloader.peek(size - 1)
        if routers:
            count_choices(routers, batches, self.step, self.device)
        if own is not None:
            own = sum(self.labelled(b).to(own.device) for b in batches)
            own = trainer.strategy.reduce(own.clone(), reduce_op="sum") if trainer.world_size > 1 else own
        return Update(k * trainer.world_size, k / size, own, routers)

    def weight(self, batch, index: int) -> Tensor | float:
        """What micro-batch number `index` of the update counts."""
        update = self._update
        return 1.0 if update.parts == 1 else update.weight(self.labelled(batch), index)

    def weighted_loss(self, out: StepOutput, weight: Tensor | float) -> Tensor:
        """A micro-batch's part of the update's loss."""
        weight = weight.to(out.loss.dtype) if isinstance(weight, Tensor) else weight
        loss = out.loss if isinstance(weight, float) and weight == 1 else out.loss * weight
        loss = loss if out.auxiliary is None else loss + out.auxiliary * self._update.filling
        self._losses = [part * weight for part in (out.losses or {}).values()]
        if not self._losses:
            return loss
        self._losses += [] if out.auxiliary is None else [out.auxiliary * self._update.filling]
        self._factor = loss.detach().requires_grad_()
        return self._factor

    def step_that_fits(self, batch) -> StepOutput:
        """`step` for training; in twice as many parts when memory runs out and `halve_batch` allows it."""
        while True:
            try:
                return step_in_parts(self.step, self.labelled, batch, self.parts)
            except Exception as error:
                if not (self.halve_batch and is_out_of_memory(error)):
                    raise
                self.parts = halve(self.parts, batch, self.trainer.global_step, error)

    def backward(self, loss: Tensor, *args, **kwargs) -> None:
        """Gradients; when memory runs out, what was added up is dropped and the update so far is computed anew.

        That cannot be done on several ranks, whose sums would no longer agree, nor with fp16's scaled losses.
        """
        trainer = self.trainer
        try:
            super().backward(loss, *args, **kwargs)
            return self.backward_by_name()
        except Exception as error:
            alone = trainer.world_size == 1 and trainer.precision != "16-mixed"
            if not (self.halve_batch and alone and is_out_of_memory(error)):
                raise
            self._losses = []
            loss.detach_()  # lets go of the graph and of what it holds
            self.parts = halve(self.parts, self._micro_batches[-1][0], trainer.global_step, error)
        while True:
            self.zero_grad()
            try:
                for index, (batch, weight) in enumerate(self._micro_batches):
                    self.weight(batch, index)
                    with trainer.precision_plugin.train_step_context():
                        again = self.weighted_loss(self.step_that_fits(batch), weight)
                    (again / trainer.accumulate_grad_batches).backward()
                    self.backward_by_name()
                return None
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                self.parts = halve(self.parts, batch, trainer.global_step, error)

    def backward_by_name(self) -> None:
        """One backward pass for each of a step's named losses, after the one of the leaf that stood for their sum: its
        gradient is what precision and accumulation multiply by. All in one on several ranks, whose sums run once."""
        losses, self._losses = self._losses, []
        passes = [losses] if self.trainer.world_size > 1 else [[part] for part in losses]
        for i, parts in enumerate(passes if losses else ()):
            torch.autograd.backward(parts, [self._factor.grad] * len(parts), retain_graph=i + 1 < len(passes))

    def note_training(self, loss: Tensor, metrics: dict[str, Tensor], weight: Tensor | float) -> None:
        """Means over the update's micro-batches and over all ranks, noted when a row of the loggers is due."""
        trainer, k = self.trainer, self.trainer.accumulate_grad_batches
        if k == 1 and not self.measuring:
            self.trained_loss = loss.detach()
            return
        plain = isinstance(weight, float) and weight == 1
        values = {"loss": loss.detach()} | {name: v if plain else v * weight for name, v in metrics.items()}
        if k > 1:
            before = {} if trainer.fit_loop.batch_idx % k == 0 else self._means
            values = {name: v / k + before.get(name, 0) for name, v in values.items()}
        self._means, self.trained_loss = values, values["loss"]
        if self.measuring and update_is_complete(trainer):
            means = values if trainer.world_size == 1 else _mean_over_ranks(values, trainer)
            for name, value in means.items():
                self.note(f"train/{name}", float(value))

    def note(self, name: str, value: float) -> None:
        """Put a number into the row that the loggers get after this step, and before callbacks; when `measuring`.

        Lightning's `log` does more (epoch means, reductions) and takes a millisecond for every name.
        """
        self.row[name] = value
        self.trainer.callback_metrics[name] = torch.tensor(value, dtype=torch.float64)

    def gradients(self) -> list[Tensor]:
        """Of all parameters that the optimiser has and that got one."""
        groups = self.trainer.optimizers[0].param_groups
        return [p.grad for group in groups for p in group["params"] if p.grad is not None]

    def transfer_batch_to_device(self, batch, device: torch.device, dataloader_idx: int):
        """What is on the CPU already is not walked through."""
        return batch if device.type == "cpu" else super().transfer_batch_to_device(batch, device, dataloader_idx)

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        """Clip by the norm that is known already (a skipped update has none left to clip); by value as Lightning."""
        by_norm = gradient_clip_algorithm in (None, "norm")
        if gradient_clip_val and by_norm and self.gradient_norm is not None:
            if self.gradient_norm > gradient_clip_val:
                parameters = [p for group in optimizer.param_groups for p in group["params"]]
                norm = torch.tensor(self.gradient_norm, dtype=torch.float64)
                torch.nn.utils.clip_grads_with_norm_(parameters, gradient_clip_val, norm)
        elif gradient_clip_val and self.gradients():
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
        self.validation = {f"val/{k}": v for k, v in self.validation_means().items()}
        self.log_dict(self.validation, logger=False)  # for callbacks; train/rows.py hands them to the loggers

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
        checkpoint["task"] = {"seen": self.seen, "parts": self.parts}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.seen = checkpoint.get("task", {}).get("seen", 0)
        self.parts = checkpoint.get("task", {}).get("parts", 1)


def _mean_over_ranks(values: dict[str, Tensor], trainer) -> dict[str, Tensor]:
    """One reduction for all of them."""
    names = sorted(values)
    stacked = torch.stack([values[k].double().reshape(()) for k in names])
    return dict(zip(names, trainer.strategy.reduce(stacked, reduce_op="mean")))
