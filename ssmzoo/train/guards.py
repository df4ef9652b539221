"""Refuse to train on NaN, and say what looks wrong: spikes of the loss, experts that get nothing to do."""

from __future__ import annotations

import math
from pathlib import Path

import lightning as L
import torch

from ssmzoo.train.errors import TrainingFailed


class Guards(L.Callback):
    """Non-finite losses and gradients: skip up to `max_skips` updates in a row, then stop with a dump of the batch.

    max_skips     0: stop at the first
    spike         report a loss above `spike` times its running mean (0: never)
    dead_experts  report experts that got less than a hundredth of an even share over so many updates (0: never)
    halve_batch   when memory runs out in a training step, compute each batch in halves, quarters, ... from then on,
                  with the same gradient on average (see ssmzoo.tasks.micro_batch); off: stop and say what to lower
    """

    def __init__(
        self, run_dir: Path, max_skips: int = 0, spike: float = 3.0, dead_experts: int = 200, halve_batch: bool = False
    ):
        for name, value in (("max_skips", max_skips), ("spike", spike), ("dead_experts", dead_experts)):
            if value < 0:
                raise ValueError(f"callbacks.guards.{name} is {value}; it must not be negative")
        self.run_dir, self.max_skips, self.spike, self.halve_batch = Path(run_dir), max_skips, spike, halve_batch
        self.skipped_in_a_row, self.skipped, self._mean, self._batch = 0, 0, None, None
        self.gradient_norm = self.loss = float("nan")
        self.dead_experts, self._load, self._loads, self._dead = dead_experts, None, 0, None

    def state_dict(self) -> dict:
        return {"skipped_in_a_row": self.skipped_in_a_row, "skipped": self.skipped, "mean": self._mean}

    def load_state_dict(self, state: dict) -> None:
        self.skipped_in_a_row, self.skipped, self._mean = state["skipped_in_a_row"], state["skipped"], state["mean"]

    def on_fit_start(self, trainer, task) -> None:
        task.halve_batch = self.halve_batch

    def on_train_batch_start(self, trainer, task, batch, batch_idx) -> None:
        self._batch = batch

    def on_before_optimizer_step(self, trainer, task, optimizer) -> None:
        gradients = task.gradients()
        norm = torch.nn.utils.get_total_norm(gradients) if gradients else torch.tensor(0.0)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of shards on all ranks
        task.gradient_norm = self.gradient_norm = float(norm)  # the task clips by it
        if task.measuring:
            task.note("train/grad_norm", self.gradient_norm)
        loss = task.trained_loss
        if math.isfinite(self.gradient_norm) and (loss is None or math.isfinite(float(loss))):
            self.skipped_in_a_row = 0
            return
        self.skipped_in_a_row += 1
        self.skipped += 1
        where = (
            f"step {trainer.global_step}: loss {float(loss) if loss is not None else float('nan'):.4g}, gradient norm "
            f"{self.gradient_norm:.4g}, learning rate {optimizer.param_groups[0]['lr']:.3g}"
        )
        if self.skipped_in_a_row > self.max_skips:
            bad = next(
                (n for n, p in task.model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()),
                None,
            )
            raise TrainingFailed(
                f"NaN or Inf at {where}"
                + (f" (first in {bad})" if bad else "")
                + f"; the batch {self._dump()}, the last good checkpoint is kept. "
                f"Lower optim.lr, raise optim.warmup_steps, or set trainer.precision=32-true"
            )
        print(f"warning: update skipped at {where}", flush=True)
        optimizer.zero_grad()  # without gradients nothing is clipped and no parameter moves

    def _dump(self) -> str:
        file = self.run_dir / "bad_batch.pt"
        try:
            torch.save(self._batch, file)
        except (OSError, RuntimeError) as error:  # the disk may be full as well
            return f"could not be written ({str(error).splitlines()[0]})"
        return f"is in {file}"

    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx) -> None:
        if self.dead_experts and task.expert_load is not None:
            self._watch_experts(trainer, task.expert_load)
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        if loss is None or not self.spike:
            return
        value = float(loss) * trainer.accumulate_grad_batches
        if self._mean is not None and trainer.global_step > 50 and value > self.spike * self._mean:
            print(
                f"warning: loss spike at step {trainer.global_step}: {value:.4g}, running mean {self._mean:.4g} "
                f"(epoch {trainer.current_epoch}, batch {batch_idx})",
                flush=True,
            )
        if math.isfinite(value):
            self._mean = value if self._mean is None else 0.98 * self._mean + 0.02 * value

    def _watch_experts(self, trainer, load: torch.Tensor) -> None:
        """load (layers e) or (e): the share of the batch's tokens that each expert was chosen for."""
        self._load, self._loads = load if self._load is None else self._load + load, self._loads + 1
        if self._loads < self.dead_experts * trainer.accumulate_grad_batches:
            return
        mean = trainer.strategy.reduce(self._load / self._loads, reduce_op="mean")
        mean, self._load, self._loads = mean.reshape(-1, mean.shape[-1]), None, 0
        dead = [(mean[i] < 0.01 * mean[i].mean()).nonzero().flatten().tolist() for i in range(len(mean))]
        if dead != self._dead and any(dead) and trainer.is_global_zero:
            named = "; ".join(f"MoE layer {i}: {', '.join(map(str, e))}" for i, e in enumerate(dead) if e)
            print(
                f"warning: dead experts at step {trainer.global_step}, with under 1 % of an even share over "
                f"{self.dead_experts} updates: {named}. Raise "
                f"model.balance_weight, or lower model.n_experts or optim.lr",
                flush=True,
            )
        self._dead = dead
