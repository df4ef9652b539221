"""When checkpoints are written, which of them stay, and what happens when one cannot be written."""

from __future__ import annotations

import json
import math
import re
import shutil
import time
from pathlib import Path
from typing import Any

import lightning as L

from ssmzoo.checkpoint_files import INDEX, MANIFEST, read_index, read_json
from ssmzoo.tasks.accumulation import update_is_complete
from ssmzoo.train.checkpoint import remove_leftovers, write_text
from ssmzoo.train.errors import TrainingFailed

LONGEST_WAIT = 64  # optimiser steps between two tries to write a checkpoint


def validation_is_due(trainer) -> bool:
    """Does a validation follow this batch, or did it just, by the interval and not because the run is to stop?"""
    every, loop = trainer.check_val_every_n_epoch, trainer.fit_loop
    if not trainer.enable_validation or (every is not None and (trainer.current_epoch + 1) % every):
        return False
    if trainer.val_check_batch == math.inf:  # the loader has no length
        return trainer.is_last_batch
    done = (loop.total_batch_idx if every is None else loop.batch_idx) + 1
    return done % trainer.val_check_batch == 0


def last_step(trainer) -> bool:
    """Has the run reached the end that its configuration names?"""
    epochs = trainer.max_epochs
    over = trainer.is_last_batch and epochs not in (None, -1) and trainer.current_epoch + 1 >= epochs
    return over or trainer.global_step == trainer.max_steps


def end_after_this_step(trainer) -> None:
    """Let Lightning stop now, with a validation, whatever smallest number of steps or epochs it was given."""
    trainer.should_stop = True
    trainer.fit_loop.epoch_loop.min_steps = trainer.fit_loop.min_epochs = None


class Checkpointer(L.Callback):
    """Keep the last checkpoint and the best ones; a failed write is reported, retried and costs no earlier checkpoint.

    folder           where checkpoints and index.json go
    every_n_steps    save at these optimiser steps; 0: only with a validation, at the end and when asked to stop
    every_n_minutes  and after this much time; 0: never
    keep_best        how many of the best by `val/<monitor>` stay;  keep_last  how many of the newest stay

    A checkpoint that a run can continue from is written between updates only, and where a validation is due after it:
    Lightning would leave that one out when resumed from a state before it. A validation that falls into the middle
    of an update (accumulated micro-batches) keeps its weights as a candidate for the best, without a trainer's state.
    """

    def __init__(
        self,
        folder: Path,
        monitor: str,
        mode: str,
        every_n_steps: int = 0,
        every_n_minutes: float = 0.0,
        keep_best: int = 1,
        keep_last: int = 2,
    ):
        if keep_last < 1 or keep_best < 0 or every_n_steps < 0 or every_n_minutes < 0:
            raise ValueError(
                "callbacks: keep_last must be at least 1; keep_best, every_n_steps and every_n_minutes at least 0"
            )
        self.folder, self.monitor, self.mode = Path(folder), f"val/{monitor}", mode
        self.every_n_steps, self.every_n_minutes = every_n_steps, every_n_minutes
        self.keep_best, self.keep_last = keep_best, keep_last
        self.index: dict[str, Any] = {"last": None, "recent": [], "best": [], "monitor": self.monitor, "mode": mode}
        self.index |= read_index(self.folder) or {}
        self.index |= {"monitor": self.monitor, "mode": mode}
        self.saved_step, self._saved_time = -1, time.monotonic()
        self.failures, self._try_again_at = 0, math.inf  # writes that failed in a row; step of the next try

    def on_fit_start(self, trainer, task) -> None:
        if trainer.is_global_zero:
            remove_leftovers(self.folder)

    def on_load_checkpoint(self, trainer, task, checkpoint) -> None:
        self.saved_step = checkpoint["global_step"]

    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx) -> None:
        step, complete = trainer.global_step, update_is_complete(trainer)
        ends = complete and last_step(trainer)
        if ends:
            end_after_this_step(trainer)  # so that the last steps are validated, too
        if step in (0, self.saved_step) or not complete or validation_is_due(trainer):
            return
        late = self.every_n_minutes and time.monotonic() - self._saved_time > 60 * self.every_n_minutes
        due = (
            step >= self._try_again_at
            or (self.every_n_steps and step % self.every_n_steps == 0)
            or (late and trainer.world_size == 1)
            or (self.every_n_minutes and trainer.world_size > 1 and trainer.strategy.broadcast(bool(late)))
        )
        # the last step is saved here and not in on_train_end, where averaged weights have replaced the trained ones
        if due or trainer.should_stop:
            self.save(trainer, unvalidated=ends and trainer.enable_validation)

    def on_validation_end(self, trainer, task) -> None:
        """After a validation that only the end of the run asked for, the state from before it stays the last."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        if self.saved_step == trainer.global_step and not validation_is_due(trainer):
            if trainer.is_global_zero:
                self._add_metrics(self.index["last"], trainer)
        else:
            self.save(trainer, self._value(trainer))

    def _add_metrics(self, name: str, trainer) -> None:
        """A validation of weights that were saved before it."""
        manifest, value = self.folder / name / MANIFEST, self._value(trainer)
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items()}
        try:
            write_text(manifest, json.dumps(read_json(manifest) | {"metrics": metrics}, indent=1))
            self._record(name, trainer.global_step, value, whole=True)
        except (OSError, ValueError) as error:
            print(f"warning: the last validation could not be noted with {name} ({error})", flush=True)

    def on_train_end(self, trainer, task) -> None:
        if self._not_finite(trainer):
            raise TrainingFailed(
                f"weights are NaN or Inf at step {trainer.global_step}; the last good checkpoint is kept. "
                f"Lower optim.lr, raise optim.warmup_steps, or set trainer.precision=32-true"
            )
        for seconds in (0, 1, 2, 4):
            if self.saved_step == trainer.global_step and not self.failures:
                return
            time.sleep(seconds if self.failures else 0)
            self.save(trainer, whole=True)

    def _value(self, trainer) -> float | None:
        value = trainer.callback_metrics.get(self.monitor)
        return None if value is None or not math.isfinite(float(value)) else float(value)

    def save(self, trainer, value: float | None = None, whole: bool | None = None, unvalidated: bool = False) -> None:
        """Write the state as it is now; `value` ranks it among the best.

        whole        with the trainer's state, so that a run can continue from it; None: when no update is half done
        unvalidated  no step follows but a validation, which a run that continued from here would leave out
        """
        step, store = trainer.global_step, trainer.strategy.checkpoint_io
        whole = update_is_complete(trainer) if whole is None else whole
        if not whole:
            self._try_again_at = min(self._try_again_at, step + 1)
            if value is None or not self._would_be_kept(value):
                return
        if self._not_finite(trainer):
            if trainer.is_global_zero:
                print(
                    f"warning: weights are NaN or Inf at step {step}: not saved, the last good ones stay",
                    flush=True,
                )
            return
        name = trainer.strategy.broadcast(self._free_name(step))
        store.weights_only = not whole
        trainer.save_checkpoint(self.folder / name)
        error = store.error
        if trainer.is_global_zero and error is None:
            try:
                self._record(name, step, value, whole, unvalidated)
            except OSError as failed:
                shutil.rmtree(self.folder / name, ignore_errors=True)
                error = failed
        if trainer.strategy.broadcast(error is not None):
            self._report(error, self.folder / name, step, trainer.is_global_zero)
        elif whole:
            self.saved_step, self._saved_time = step, time.monotonic()
            self.failures, self._try_again_at = 0, math.inf

    @staticmethod
    def _not_finite(trainer) -> bool:
        """Is a weight, or a buffer that is saved with them, NaN or infinite on any rank?"""
        bad = any(not t.isfinite().all() for t in trainer.lightning_module.model.state_dict().values())
        return trainer.strategy.reduce_boolean_decision(bad, all=False) if trainer.world_size > 1 else bad

    def _would_be_kept(self, value: float) -> bool:
        if len(self.index["best"]) < self.keep_best or not self.keep_best:
            return bool(self.keep_best)
        worst = self.index["best"][-1]["value"]
        return value > worst if self.mode == "max" else value < worst

    def _report(self, error: OSError | None, folder: Path, step: int, speak: bool) -> None:
        self.failures += 1
        wait = min(2 ** (self.failures - 1), LONGEST_WAIT)
        self._try_again_at = step + wait
        if speak:
            print(
                f"warning: checkpoint {folder} could not be written ({error}); training goes on and tries again "
                f"{'after the next step' if wait == 1 else f'in {wait} steps'}, earlier checkpoints stay",
                flush=True,
            )

    def _free_name(self, step: int) -> str:
        """`step-00000100`, or `step-00000100-2` when the index names that already; a folder it does not name goes."""
        kept, name, count = self._names(self.index), f"step-{step:08d}", 1
        while name in kept:
            count += 1
            name = f"step-{step:08d}-{count}"
        if (self.folder / name).exists():
            shutil.rmtree(self.folder / name, ignore_errors=True)
        return name

    @staticmethod
    def _names(index: dict[str, Any]) -> set[str]:
        return {*index["recent"], *(b["name"] for b in index["best"])} | ({index["last"]} - {None})

    def _record(self, name: str, step: int, value: float | None, whole: bool, unvalidated: bool = False) -> None:
        """Point index.json to the new checkpoint, then delete what nothing points to."""

        def other(entry: str) -> bool:
            """Another step's, and still there (someone may have emptied the folder)."""
            return int(re.match(r"step-(\d+)", entry)[1]) != step and (self.folder / entry).is_dir()

        old = self.index
        index = old | {"recent": [n for n in old["recent"] if n != name and (self.folder / n).is_dir()]}
        if whole:
            recent = [n for n in index["recent"] if other(n)] + [name]
            index |= {"last": name, "recent": recent[-self.keep_last :], "unvalidated": name if unvalidated else None}
        best = [b for b in old["best"] if (self.folder / b["name"]).is_dir()]
        if value is not None and self.keep_best:
            best = [b for b in best if other(b["name"])] + [{"name": name, "value": value}]
            best = sorted(best, key=lambda b: b["value"], reverse=self.mode == "max")
        index["best"] = best[: self.keep_best]
        write_text(self.folder / INDEX, json.dumps(index, indent=1))
        self.index, wanted = index, self._names(index)
        for folder in self.folder.glob("step-*"):
            if folder.name not in wanted:
                shutil.rmtree(folder, ignore_errors=True)
