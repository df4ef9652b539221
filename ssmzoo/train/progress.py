"""What a user sees while a run goes on: one line that moves on a terminal, a line now and then in a log file."""

from __future__ import annotations

import contextlib
import os
import sys
import time

import lightning as L
import torch
from lightning.pytorch.profilers import PassThroughProfiler

from ssmzoo.terminal import raw


class NoProfiler(PassThroughProfiler):
    """Lightning opens a context around every hook of every callback, fifty times a step: this one costs nothing."""

    _nothing = contextlib.nullcontext()

    def profile(self, action_name: str) -> contextlib.nullcontext:
        return self._nothing


def clock(seconds: float) -> str:
    """75 -> '1:15', 3700 -> '1:01:40'."""
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


def peak_memory() -> int:
    """Bytes: the most this process had allocated on its GPU, or the most that was resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        with open("/proc/self/status") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith("VmHWM"))
    except (OSError, StopIteration):  # not Linux
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def memory_in_use() -> int:
    """Bytes: the most this process had allocated on its GPU, or what is resident now; takes microseconds."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):  # not Linux
        return peak_memory()


class Progress(L.Callback):
    """Step, loss, learning rate, throughput, memory and time left.

    every_seconds  how often a line is printed when the output is not a terminal
    """

    def __init__(self, every_seconds: float = 10.0):
        self.every_seconds = every_seconds
        self._bar = self._job = None
        self._start = self._printed = 0.0
        self._first_seen = self._first_step = 0
        self._first = True  # no line of this process has been printed
        self.paused = 0.0  # seconds spent in validation, not counted in throughput
        self._paused_at: float | None = None

    def on_train_start(self, trainer, task) -> None:
        self._start = self._printed = time.monotonic()
        self._first_seen, self._first_step = task.seen, trainer.global_step
        if not trainer.is_global_zero or not sys.stdout.isatty():
            return
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bar

        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[line]}"),
            console=Console(file=raw(sys.stdout)),
        )
        self._job = self._bar.add_task("training", total=self._total(trainer), line="")
        self._bar.start()

    @staticmethod
    def _total(trainer) -> int | None:
        if trainer.max_steps > 0:
            return trainer.max_steps
        batches = trainer.num_training_batches
        if trainer.max_epochs and trainer.max_epochs > 0 and batches != float("inf"):
            return trainer.max_epochs * -(-int(batches) // trainer.accumulate_grad_batches)
        return None

    def throughput(self, trainer, task) -> float:
        """Items per second of training over all ranks, validation left out."""
        spent = time.monotonic() - self._start - self.paused
        return (task.seen - self._first_seen) * trainer.world_size / max(spent, 1e-9)

    def line(self, trainer, task, outputs) -> str:
        total, step = self._total(trainer), trainer.global_step
        done = step - self._first_step
        spent = time.monotonic() - self._start
        left = f", {clock(spent / max(done, 1) * (total - step))} left" if total and done else ""
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        shown = float(loss) * trainer.accumulate_grad_batches if loss is not None else float("nan")
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        memory = f", {peak_memory() / 2**30:.1f} GiB"
        return (
            f"step {step}{f'/{total}' if total else ''}, loss {shown:.4f}, lr {rate:.2e}, "
            f"{self.throughput(trainer, task):,.0f} {task.unit}/s{memory}{left}"
        )

    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx) -> None:
        if not trainer.is_global_zero:
            return
        now = time.monotonic()
        if self._bar is not None:
            if now - self._printed > 0.2:
                self._printed = now
                self._bar.update(self._job, completed=trainer.global_step, line=self.line(trainer, task, outputs))
        elif now - self._printed > self.every_seconds or self._first:
            self._printed, self._first = now, False
            print(self.line(trainer, task, outputs), flush=True)

    def on_validation_start(self, trainer, task) -> None:
        self._paused_at = time.monotonic()

    def on_validation_end(self, trainer, task) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking or self._paused_at is None:
            return
        self.paused += time.monotonic() - self._paused_at
        if trainer.is_global_zero:
            shown = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
            text = f"step {trainer.global_step}: " + ", ".join(f"{k} {v:.4f}" for k, v in sorted(shown.items()))
            (self._bar.console.print if self._bar is not None else print)(text)

    def on_train_end(self, trainer, task) -> None:
        if self._bar is not None:
            self._bar.update(self._job, completed=trainer.global_step)
            self._bar.stop()
            self._bar = None

    def on_exception(self, trainer, task, exception) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
