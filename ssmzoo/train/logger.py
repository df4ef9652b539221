"""Loggers: a CSV file that survives a resume, and wandb without a login prompt."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

from ssmzoo.train.checkpoint import write_text


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Rows of a metrics.csv as numbers; empty cells are left out, and so is a last row that was cut off."""
    if not Path(path).exists():
        return []
    whole = Path(path).read_text(encoding="utf-8").rpartition("\n")[0]
    return [{k: float(v) for k, v in row.items() if v not in ("", None)} for row in csv.DictReader(whole.splitlines())]


class CSVFile(Logger):
    """One row per logged step in <run>/metrics.csv. On resume, rows after the checkpoint's step are dropped."""

    def __init__(self, path: Path):
        super().__init__()
        self.path = Path(path)
        self._columns: list[str] = ["step"]
        self._rows: list[dict[str, Any]] = []
        self._failures = 0
        self._written = 0  # rows that are in the file; 0 asks for all of it to be written anew
        if self.path.exists():
            self._rows = read_metrics(self.path)
            for row in self._rows:
                row["step"] = int(row["step"])
                self._columns += [k for k in row if k not in self._columns]
            self._written = len(self._rows) if self.path.read_bytes().endswith(b"\n") else 0

    name, version = "csv", ""

    @property
    @rank_zero_experiment
    def experiment(self) -> CSVFile:
        return self

    @property
    def save_dir(self) -> str:
        return str(self.path.parent)

    def log_hyperparams(self, params, *args, **kwargs) -> None:
        """The resolved config is in config.yaml beside the file."""

    @rank_zero_only
    def start_after(self, step: int) -> None:
        """Forget what an earlier process logged beyond the checkpoint it is resumed from."""
        kept = [row for row in self._rows if row["step"] < step]
        if len(kept) != len(self._rows):
            self._rows, self._written = kept, 0

    @rank_zero_only
    def complete(self, step: int, metrics: dict[str, float]) -> None:
        """Log a step unless it is there already."""
        if self._same_row(step, metrics) is None:
            self.log_metrics(metrics, step)

    def _same_row(self, step: int, metrics: dict[str, float]) -> int | None:
        """Index of the row that has these metrics of this step."""
        for i in range(len(self._rows) - 1, max(-1, len(self._rows) - 4), -1):
            if self._rows[i]["step"] == step and set(metrics) & set(self._rows[i]) - {"epoch"}:
                return i
        return None

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        step, values = int(step or 0), {k: float(v) for k, v in metrics.items()}
        same = self._same_row(step, metrics)
        if same is not None:  # a validation that is repeated because its checkpoint was not finished
            self._rows[same].update(values)
            self._written = 0
        elif not self._rows or self._rows[-1]["step"] != step or self._written == len(self._rows):
            self._rows.append({"step": step} | values)
        else:
            self._rows[-1].update(values)
        new = [k for k in metrics if k not in self._columns]
        if new:
            self._columns, self._written = self._columns + new, 0

    @rank_zero_only
    def save(self) -> None:
        if self._written == len(self._rows) and self.path.exists():
            return
        anew = self._written == 0 or not self.path.exists()
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self._columns, restval="")
        if anew:
            writer.writeheader()
        writer.writerows(self._rows[0 if anew else self._written :])
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if anew:
                write_text(self.path, text.getvalue())
            else:
                with open(self.path, "a", newline="", encoding="utf-8") as file:
                    file.write(text.getvalue())
        except OSError as error:
            self._written = 0  # a part of the rows may be in the file
            self._complain(error)
            return
        self._written, self._failures = len(self._rows), 0

    def _complain(self, error: OSError) -> None:
        """At the 1st, 2nd, 4th, 8th ... failure in a row."""
        self._failures += 1
        if self._failures & (self._failures - 1) == 0:
            print(f"warning: {self.path} could not be written ({error}); training goes on and tries again", flush=True)

    def finalize(self, status: str) -> None:
        self.save()


def start_after(loggers: list, step: int) -> None:
    """Forget what was logged at `step` and later, before a run goes on from there.

    metrics.csv is cut, TensorBoard hides such rows; wandb only appends, so there they appear twice.
    """
    for logger in loggers:
        if isinstance(logger, CSVFile):
            logger.start_after(step)
        elif type(logger).__name__ == "TensorBoardLogger":
            logger._kwargs["purge_step"] = step  # read when its first row is written


def wandb_logger(run_dir: Path, project: str, name: str, mode: str | None = None, entity: str | None = None):
    """Lightning's WandbLogger: online when a key is present, offline otherwise; it never waits for a login."""
    if mode not in (None, "online", "offline", "disabled"):
        raise ValueError(f"logger.mode is {mode!r}; choose online, offline, disabled or leave it out")
    try:
        import wandb  # noqa: F401
    except ImportError:
        raise ValueError("logger=wandb needs the package wandb: pip install wandb") from None
    from lightning.pytorch.loggers import WandbLogger

    if mode is None:
        mode = "online" if _has_wandb_key() else "offline"
    if mode == "offline":
        print(f"wandb: no key found or offline asked for; upload later with `wandb sync {run_dir}/wandb/offline-run-*`")
    identity = Path(run_dir) / "wandb_id.txt"
    if not identity.exists():
        identity.write_text(os.urandom(6).hex())
    return WandbLogger(
        project=project,
        name=name,
        entity=entity,
        save_dir=str(run_dir),
        id=identity.read_text().strip(),
        resume="allow",
        mode=mode,
        log_model=False,
    )


@contextlib.contextmanager
def ending_wandb() -> Iterator[None]:
    """End wandb's run with the block: the next run of a sweep in this process would go on in it."""
    status = 1
    try:
        yield
        status = 0
    finally:
        wandb = sys.modules.get("wandb")
        if wandb is not None and getattr(wandb, "run", None) is not None:
            wandb.finish(exit_code=status)


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    import netrc

    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def tensorboard_logger(run_dir: Path):
    """Lightning's TensorBoardLogger, writing into <run>/tensorboard."""
    from lightning.pytorch.loggers import TensorBoardLogger

    try:
        return TensorBoardLogger(save_dir=str(run_dir), name="tensorboard", version="")
    except ModuleNotFoundError:
        raise ValueError("logger=tensorboard needs the package tensorboard: pip install tensorboard") from None
