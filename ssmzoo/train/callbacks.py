"""Callbacks of the shared loop: keep checkpoints, restore random states, stop politely, refuse to train on NaN."""

from __future__ import annotations

import json
import math
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch

from ssmzoo.train.checkpoint import INDEX, read_json, write_text

RESUME_ME = 75  # exit status of a run that was asked to stop and can be resumed (EX_TEMPFAIL)


class TrainingFailed(RuntimeError):
    """A run that cannot go on; the message says what happened, where, and what to do."""


class RandomStates(L.Callback):
    """Python, NumPy, torch and CUDA generators continue where the checkpoint left them."""

    def __init__(self) -> None:
        self._restore: dict[str, Any] | None = None

    def on_save_checkpoint(self, trainer, task, checkpoint) -> None:
        name, keys, position, has_gauss, gauss = np.random.get_state()
        checkpoint["random_states"] = {
            "python": random.getstate(),
            "numpy": (name, keys.tolist(), position, has_gauss, gauss),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }

    def on_load_checkpoint(self, trainer, task, checkpoint) -> None:
        self._restore = checkpoint.get("random_states")

    def on_train_batch_start(self, trainer, task, batch, batch_idx) -> None:
        if self._restore is None:  # only the first batch, after the loader has drawn whatever it draws
            return
        states, self._restore = self._restore, None
        version, internal, gauss = states["python"]
        random.setstate((version, tuple(internal), gauss))
        name, keys, *rest = states["numpy"]
        np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
        torch.set_rng_state(states["torch"])
        if states["cuda"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(states["cuda"])


class Checkpointer(L.Callback):
    """Keep the last checkpoint and the best ones; a failed write is reported, retried and costs no earlier checkpoint.

    folder           where checkpoints and index.json go
    every_n_steps    save at these optimiser steps; 0: only with a validation, at the end and when asked to stop
    every_n_minutes  and after this much time; 0: never
    keep_best        how many of the best by `val/<monitor>` stay;  keep_last  how many of the newest stay
    """

    def __init__(
        self,
        folder: Path,
        monitor: str,
        mode: str,
        every_n_steps: int = 0,
        every_n_minutes: float = 0.0,
        keep_best: int = 1,
        keep_last: int = 1,
    ):
        if keep_last < 1 or keep_best < 0 or every_n_steps < 0 or every_n_minutes < 0:
            raise ValueError(
                "callbacks: keep_last must be at least 1; keep_best, every_n_steps and every_n_minutes at least 0"
            )
        self.folder, self.monitor, self.mode = Path(folder), f"val/{monitor}", mode
        self.every_n_steps, self.every_n_minutes = every_n_steps, every_n_minutes
        self.keep_best, self.keep_last = keep_best, keep_last
        self.index: dict[str, Any] = {"last": None, "recent": [], "best": [], "monitor": self.monitor, "mode": mode}
        if (self.folder / INDEX).exists():
            self.index |= read_json(self.folder / INDEX)
        self._saved_step, self._saved_time, self._retry = -1, time.monotonic(), False

    def on_save_checkpoint(self, trainer, task, checkpoint) -> None:
        """Lightning logs a step after this point: its metrics go along, or a killed run would miss one row."""
        checkpoint["step_metrics"] = {
            k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("train/")
        }

    def on_load_checkpoint(self, trainer, task, checkpoint) -> None:
        step, metrics = checkpoint["global_step"] - 1, checkpoint.get("step_metrics")
        if metrics and (step + 1) % trainer.log_every_n_steps == 0:
            trainer.loggers[0].complete(step, metrics)

    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx) -> None:
        step = trainer.global_step
        if step == self._saved_step or trainer.fit_loop._should_accumulate():
            return
        due = self._retry or (self.every_n_steps and step % self.every_n_steps == 0)
        due = due or (self.every_n_minutes and time.monotonic() - self._saved_time > 60 * self.every_n_minutes)
        if due and step > 0:
            self.save(trainer)

    def on_validation_end(self, trainer, task) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.save(trainer, self._value(trainer))

    def on_train_end(self, trainer, task) -> None:
        if trainer.global_step != self._saved_step:
            self.save(trainer)

    def _value(self, trainer) -> float | None:
        value = trainer.callback_metrics.get(self.monitor)
        return None if value is None or not math.isfinite(float(value)) else float(value)

    def save(self, trainer, value: float | None = None) -> None:
        """Write the state as it is now; `value` ranks it among the best."""
        name = f"step-{trainer.global_step:08d}"
        try:
            trainer.save_checkpoint(self.folder / name)
            if trainer.is_global_zero:
                self._record(name, value)
        except OSError as error:
            self._retry = True
            print(
                f"warning: checkpoint {self.folder / name} could not be written ({error}); "
                f"training goes on and tries again, earlier checkpoints stay",
                flush=True,
            )
            return
        self._saved_step, self._saved_time, self._retry = trainer.global_step, time.monotonic(), False

    def _record(self, name: str, value: float | None) -> None:
        index = self.index
        index["last"] = name
        index["recent"] = [n for n in index["recent"] if n != name] + [name]
        index["recent"] = index["recent"][-self.keep_last :]
        if value is not None and self.keep_best:
            best = [b for b in index["best"] if b["name"] != name] + [{"name": name, "value": value}]
            index["best"] = sorted(best, key=lambda b: b["value"], reverse=self.mode == "max")[: self.keep_best]
        write_text(self.folder / INDEX, json.dumps(index, indent=1))
        wanted = {*index["recent"], *(b["name"] for b in index["best"])}
        for folder in self.folder.glob("step-*"):
            if folder.name not in wanted:
                shutil.rmtree(folder, ignore_errors=True)


class StopOnSignal(L.Callback):
    """SIGTERM, SIGUSR1 and Ctrl-C: finish the step, save, end. A second signal ends at once."""

    def __init__(self, checkpointer: Checkpointer):
        self.checkpointer, self.received, self._old = checkpointer, None, {}

    def on_train_start(
        self, trainer, task
    ) -> None:  # after Lightning has put its own handlers, which end with status 0
        for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
            number = getattr(signal, name, None)
            if number is not None:
                try:
                    self._old[number] = signal.signal(number, self._handle)
                except ValueError:  # not the main thread: whoever runs us there handles signals
                    return

    def _handle(self, number, frame) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name
        print(f"\n{self.received}: finishing this step, then saving (again to stop at once)", flush=True)

    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx) -> None:
        asked = (
            trainer.strategy.reduce_boolean_decision(self.received is not None, all=False)
            if trainer.world_size > 1
            else self.received is not None
        )
        if asked and not trainer.fit_loop._should_accumulate():
            self.received = self.received or "signal on another rank"
            if trainer.global_step != self.checkpointer._saved_step:
                self.checkpointer.save(trainer)
            trainer.should_stop = True
            trainer.fit_loop.epoch_loop.min_steps = trainer.fit_loop.min_epochs = None
            trainer.limit_val_batches = 0

    def teardown(self, trainer, task, stage: str) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._old = {}


class Guards(L.Callback):
    """Non-finite losses and gradients: skip up to `max_skips` updates in a row, then stop with a dump of the batch.

    max_skips   0: stop at the first
    spike       report a loss above `spike` times its running mean (0: never)
    """

    def __init__(self, run_dir: Path, max_skips: int = 0, spike: float = 3.0):
        if max_skips < 0:
            raise ValueError(f"callbacks.max_skips is {max_skips}; it must not be negative")
        self.run_dir, self.max_skips, self.spike = Path(run_dir), max_skips, spike
        self.skipped_in_a_row, self.skipped, self._mean, self._batch = 0, 0, None, None
        self.gradient_norm = float("nan")

    def on_train_batch_start(self, trainer, task, batch, batch_idx) -> None:
        self._batch = batch

    def on_before_optimizer_step(self, trainer, task, optimizer) -> None:
        gradients = [p.grad for p in task.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients) if gradients else torch.tensor(0.0)
        self.gradient_norm = float(norm)
        task.log("train/grad_norm", self.gradient_norm)
        loss = trainer.callback_metrics.get("train/loss")
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
            dump = self.run_dir / "bad_batch.pt"
            torch.save(self._batch, dump)
            bad = next(
                (n for n, p in task.model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()),
                None,
            )
            raise TrainingFailed(
                f"NaN or Inf at {where}"
                + (f" (first in {bad})" if bad else "")
                + f"; the batch is in {dump}, the last good "
                f"checkpoint is kept. Lower optim.lr, raise optim.warmup_steps, or set trainer.precision=32-true"
            )
        print(f"warning: update skipped at {where}", flush=True)
        optimizer.zero_grad()

    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx) -> None:
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
