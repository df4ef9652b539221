"""Where the time of a step goes: a trace for chrome://tracing or Perfetto, and the ten costliest operators."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import torch


class Profile(L.Callback):
    """Watch some steps with PyTorch's profiler and write <run>/trace.json and <run>/profile.txt.

    steps   how many steps are watched;  after  steps before them, while caches fill and kernels are chosen
    """

    def __init__(self, run_dir: Path, steps: int = 5, after: int = 3):
        if steps < 1 or after < 0:
            raise ValueError(f"callbacks.profile: steps is {steps} (at least 1), after is {after} (at least 0)")
        self.run_dir, self.steps, self.after = Path(run_dir), steps, after
        self._profiler, self._seen = None, 0

    def on_train_batch_start(self, trainer, task, batch, batch_idx) -> None:
        if self._seen == self.after and trainer.is_global_zero:
            from torch.profiler import ProfilerActivity, profile

            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
            self._profiler = profile(activities=activities)
            self._profiler.start()
        self._seen += 1

    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx) -> None:
        if self._profiler is not None and self._seen == self.after + self.steps:
            self._write()

    def on_train_end(self, trainer, task) -> None:
        if self._profiler is not None:  # the run was shorter
            self._write()

    def _write(self) -> None:
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        key = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        text = profiler.key_averages().table(sort_by=key, row_limit=10)
        try:
            (self.run_dir / "profile.txt").write_text(f"{self.steps} steps, sorted by {key}\n{text}\n")
            profiler.export_chrome_trace(str(self.run_dir / "trace.json"))
        except OSError as error:
            print(f"warning: the profile could not be written ({error})", flush=True)
            return
        print(f"profile of {self.steps} steps in {self.run_dir}: profile.txt, trace.json", flush=True)
