"""A row of metrics.csv, TensorBoard and wandb: every `trainer.log_every_n_steps` updates, and after every validation.

    train/...            loss and the task's metrics, means over the update; train/grad_norm before clipping
    val/...              means over the validation set
    optim/lr             learning rate of the update (of the first group of parameters)
    system/<unit>_per_s  items of training data per second on all ranks, validation left out
    system/memory_GiB    the most that was allocated on the GPU, or what is resident
    time/data_wait       share of the time since the last row that the loop waited for data

A row's step is the number of updates done, as printed.
"""

from __future__ import annotations

import time
from pathlib import Path

import lightning as L

from ssmzoo.tasks.accumulation import update_is_complete
from ssmzoo.train.errors import TrainingFailed
from ssmzoo.train.progress import memory_in_use


class Rows(L.Callback):
    """Hands the numbers that the task noted to every logger. It stands before what saves checkpoints.

    A run whose folder was removed meanwhile ends: what would be saved from then on could not be resumed.
    """

    def __init__(self, run_dir: Path):
        self.run_dir = Path(run_dir)
        self._since = self._paused_at = 0.0  # time of the last row; when the validation began
        self._waited, self._seen = 0.0, 0
        self._configured = False  # there was a config.yaml when training began

    def on_train_start(self, trainer, task) -> None:
        self._configured = self._config.exists()
        self._mark(trainer, task)

    def on_load_checkpoint(self, trainer, task, checkpoint) -> None:
        """Rows were written after the checkpoint of their step once: the one that may be missing came along."""
        step, metrics = checkpoint["global_step"], checkpoint.get("step_metrics")
        if metrics and step % trainer.log_every_n_steps == 0 and hasattr(trainer.loggers[0], "complete"):
            trainer.loggers[0].complete(step, metrics)

    def on_before_optimizer_step(self, trainer, task, optimizer) -> None:
        if task.measuring:
            task.note("optim/lr", optimizer.param_groups[0]["lr"])

    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx) -> None:
        if not update_is_complete(trainer):
            return
        self._look(trainer)
        if not task.row:
            return
        spent, waited = max(time.perf_counter() - self._since, 1e-9), self._waiting(trainer) - self._waited
        rate = (task.seen - self._seen) * trainer.world_size / spent
        row, task.row = task.row, {}
        row |= {f"system/{task.unit}_per_s": rate, "system/memory_GiB": memory_in_use() / 2**30}
        write(trainer, row | {"time/data_wait": waited / spent})
        self._mark(trainer, task)

    def on_validation_start(self, trainer, task) -> None:
        self._paused_at = time.perf_counter()
        self._look(trainer)

    def on_train_end(self, trainer, task) -> None:
        self._look(trainer)

    @property
    def _config(self) -> Path:
        return self.run_dir / "config.yaml"

    def _look(self, trainer) -> None:
        """Someone may have made the folder again, but not the configuration that a resume needs."""
        gone = not self.run_dir.is_dir() or (self._configured and not self._config.exists())
        if trainer.is_global_zero and trainer.state.fn == "fit" and gone:
            raise TrainingFailed(
                f"{self.run_dir} was removed while the run went on (seen at step {trainer.global_step}); "
                f"nothing can be saved or resumed: start it again"
            )

    def on_validation_end(self, trainer, task) -> None:
        self._since += time.perf_counter() - self._paused_at
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            write(trainer, task.validation)

    def _mark(self, trainer, task) -> None:
        self._since, self._waited, self._seen = time.perf_counter(), self._waiting(trainer), task.seen

    @staticmethod
    def _waiting(trainer) -> float:
        return getattr(trainer.train_dataloader, "waited", 0.0)


def write(trainer, row: dict[str, float]) -> None:
    for logger in trainer.loggers:
        logger.log_metrics({**row, "epoch": trainer.current_epoch}, trainer.global_step)
        logger.save()
