"""Callbacks of the shared loop: restore random states, stop politely on a signal or when the time is over."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import EarlyStopping as LightningsEarlyStopping
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.plugins.environments import SLURMEnvironment

from ssmzoo.tasks.accumulation import update_is_complete
from ssmzoo.train.checkpointer import Checkpointer, end_after_this_step, validation_is_due
from ssmzoo.train.errors import RESUME_ME
from ssmzoo.train.ledger import rank, resume_command, write_status
from ssmzoo.train.report import write_interrupted


def stop(run_dir: Path, why: str) -> NoReturn:
    """End this process with the status that says 'resume me'."""
    write_status(run_dir, "stopped")
    if rank() == 0:
        write_interrupted(run_dir, f"stopped: {why}")
    print(f"{why}; continue with: {resume_command(run_dir)}", flush=True)
    sys.exit(RESUME_ME)


def requeue(received: str) -> None:
    """Under SLURM, put the job back into the queue when the signal is the one that Lightning's SLURMEnvironment names
    (SIGUSR1; `#SBATCH --signal=SIGUSR1@90` sends it 90 s before the time limit)."""
    if rank() or not SLURMEnvironment.detect() or received != SLURMEnvironment().requeue_signal.name:
        return
    job = os.environ.get("SLURM_JOB_ID", "")
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, timeout=60)
        print(f"SLURM job {job} is back in the queue", flush=True)
    except (OSError, subprocess.SubprocessError) as error:
        print(f"warning: SLURM job {job} could not be put back into the queue ({error})", flush=True)


@contextlib.contextmanager
def interruptible(run_dir: Path) -> Iterator[None]:
    """SIGTERM and SIGUSR1 before the first step, and while the report is made, also mean 'stop and say resume me'."""

    def end(number, frame) -> None:
        requeue(signal.Signals(number).name)
        stop(run_dir, f"stopped by {signal.Signals(number).name} outside the training steps")

    old = {}
    if threading.current_thread() is threading.main_thread():
        old = {n: signal.signal(n, end) for n in (signal.SIGTERM, getattr(signal, "SIGUSR1", None)) if n is not None}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


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


class StopOnSignal(L.Callback):
    """SIGTERM, SIGUSR1 and Ctrl-C: finish the update, save, end (see `requeue`). A second signal ends at once.

    received   the name of the signal that ended the run, or None
    """

    def __init__(self, checkpointer: Checkpointer):
        self.checkpointer, self.received, self._old = checkpointer, None, {}

    def on_train_start(self, trainer, task) -> None:
        """After Lightning has put its own handlers, which end with status 0."""
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
        asked = self.received is not None
        if trainer.world_size > 1:
            asked = trainer.strategy.reduce_boolean_decision(asked, all=False)
        if asked and update_is_complete(trainer):
            self.received = self.received or "signal on another rank"
            if trainer.global_step != self.checkpointer.saved_step:
                self.checkpointer.save(trainer)
            end_after_this_step(trainer)
            if not validation_is_due(trainer):  # one that is due belongs to the run, which saves again after it
                trainer.limit_val_batches = 0

    def on_train_end(self, trainer, task) -> None:
        if self.received:
            requeue(self.received)

    def teardown(self, trainer, task, stage: str) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._old = {}

    def on_exception(self, trainer, task, exception) -> None:
        self.teardown(trainer, task, "fit")


class TimeLimit(Timer):
    """`trainer.max_time`, training time over all resumes of a run; it ends a run between updates, never within one."""

    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx) -> None:
        if not update_is_complete(trainer):
            return
        super().on_train_batch_end(trainer, task, outputs, batch, batch_idx)
        if self.time_remaining() <= 0 and trainer.is_global_zero:
            print(f"trainer.max_time is over at step {trainer.global_step}: ending", flush=True)


class EarlyStopping(LightningsEarlyStopping):
    """Lightning's, with the patience of the configuration, not of the checkpoint."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state | {"patience": self.patience})


class NewSettings(L.Callback):
    """A resumed run goes on with learning rate, weight decay, betas ... as they are configured now."""

    def on_train_start(self, trainer, task) -> None:
        fresh = task.optim(task.model)
        optimizer, scheduler = trainer.optimizers[0], trainer.lr_scheduler_configs[0].scheduler
        factor = fresh["lr_scheduler"]["scheduler"].lr_lambdas[0](scheduler.last_epoch)
        scheduler.base_lrs = list(fresh["lr_scheduler"]["scheduler"].base_lrs)
        for group, new, peak in zip(optimizer.param_groups, fresh["optimizer"].param_groups, scheduler.base_lrs):
            group |= {k: v for k, v in new.items() if k != "params"} | {"lr": peak * factor}
