"""Say so when nothing moves: which step, whether it waits for data, and where in the program it stands."""

from __future__ import annotations

import multiprocessing
import sys
import threading
import time
import traceback
from pathlib import Path

import lightning as L

from ssmzoo.train.progress import clock


class Watchdog(L.Callback):
    """A thread that looks whether steps end; it reports and never stops a run (a slow file system may come back).

    seconds   report when nothing has moved for so long, then after twice, four times ... that; 0: never
    The stacks of all threads go to <run>/stuck.txt.
    """

    def __init__(self, run_dir: Path, seconds: float = 600.0):
        if seconds < 0:
            raise ValueError(f"callbacks.watchdog.seconds is {seconds}; it must not be negative")
        self.run_dir, self.seconds = Path(run_dir), seconds
        self._doing, self._since, self._reported = "starting", time.monotonic(), 0
        self._trainer = None
        self._end: threading.Event | None = None

    def _beat(self, doing: str) -> None:
        """doing  may name `{step}`, filled in when it is reported"""
        self._doing, self._since, self._reported = doing, time.monotonic(), 0

    def on_train_start(self, trainer, task) -> None:
        self._beat("waiting for the first batch")
        self._trainer = trainer
        if self.seconds:
            self._end = threading.Event()
            threading.Thread(target=self._watch, args=(self._end,), daemon=True, name="watchdog").start()

    def on_train_batch_start(self, trainer, task, batch, batch_idx) -> None:
        self._beat("computing step {step}")

    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx) -> None:
        self._beat("waiting for data, logging or saving after step {step}")

    def on_validation_batch_start(self, trainer, task, batch, batch_idx, dataloader_idx=0) -> None:
        self._beat(f"validating at step {{step}}, batch {batch_idx}")

    def on_validation_end(self, trainer, task) -> None:
        self._beat("saving or waiting for data after the validation at step {step}")

    def teardown(self, trainer, task, stage: str) -> None:
        if self._end is not None:
            self._end.set()
            self._end = None

    def on_exception(self, trainer, task, exception) -> None:
        self.teardown(trainer, task, "fit")

    def _watch(self, end: threading.Event) -> None:
        while not end.wait(min(self.seconds / 4, 5.0)):
            idle = time.monotonic() - self._since
            if idle > self.seconds * 2**self._reported:
                self._reported += 1
                self._report(idle)

    def _report(self, idle: float) -> None:
        frames, step = sys._current_frames(), self._trainer.global_step
        main = frames.get(threading.main_thread().ident)
        where = ""
        if main is not None:
            ours = [f for f in traceback.extract_stack(main) if "ssmzoo" in f.filename] or traceback.extract_stack(main)
            where = f" in {Path(ours[-1].filename).name}:{ours[-1].lineno} ({ours[-1].name})"
        workers = multiprocessing.active_children()
        state = f", {len(workers)} data worker(s) alive" if workers else ""
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        text = "\n".join(
            f"thread {names.get(i, i)}\n" + "".join(traceback.format_stack(frame)) for i, frame in frames.items()
        )
        file = self.run_dir / "stuck.txt"
        try:
            file.write_text(text, encoding="utf-8")
            stacks = f"stacks in {file}"
        except OSError as error:
            stacks = f"{file} could not be written ({error})"
        print(
            f"warning: nothing has moved for {clock(idle)}: {self._doing.format(step=step)}{where}{state}; {stacks}. "
            f"The run goes on if this ends",
            flush=True,
        )
