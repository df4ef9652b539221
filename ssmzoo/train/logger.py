"""Loggers: a CSV file that survives a resume, and wandb without a login prompt."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Rows of a metrics.csv as numbers; empty cells are left out."""
    if not Path(path).exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return [{k: float(v) for k, v in row.items() if v not in ("", None)} for row in csv.DictReader(file)]


class CSVFile(Logger):
    """One row per logged step in <run>/metrics.csv. On resume, rows after the checkpoint's step are dropped."""

    def __init__(self, path: Path):
        super().__init__()
        self.path = Path(path)
        self._columns: list[str] = ["step"]
        self._rows: list[dict[str, Any]] = []
        self._written = 0
        if self.path.exists():
            self._rows = read_metrics(self.path)
            for row in self._rows:
                row["step"] = int(row["step"])
                self._columns += [k for k in row if k not in self._columns]
            self._written = len(self._rows)

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
        if not any(row["step"] == step and set(metrics) & set(row) for row in self._rows[-3:]):
            self.log_metrics(metrics, step)

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        step = int(step or 0)
        if not self._rows or self._rows[-1]["step"] != step or self._written == len(self._rows):
            self._rows.append({"step": step})
        self._rows[-1].update({k: float(v) for k, v in metrics.items()})
        new = [k for k in metrics if k not in self._columns]
        if new:
            self._columns, self._written = self._columns + new, 0

    @rank_zero_only
    def save(self) -> None:
        if self._written == len(self._rows) and self.path.exists():
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self._written == 0
        try:
            with open(self.path, "w" if fresh else "a", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, self._columns, restval="")
                if fresh:
                    writer.writeheader()
                writer.writerows(self._rows[self._written :])
        except OSError as error:
            print(f"warning: {self.path} could not be written ({error}); training goes on and tries again", flush=True)
            return
        self._written = len(self._rows)

    def finalize(self, status: str) -> None:
        self.save()


def wandb_logger(run_dir: Path, project: str, name: str, mode: str | None = None, entity: str | None = None):
    """Lightning's WandbLogger: online when a key is present, offline otherwise; it never waits for a login."""
    if mode not in (None, "online", "offline", "disabled"):
        raise ValueError(f"logger.mode is {mode!r}; choose online, offline, disabled or leave it out")
    try:
        import wandb  # noqa: F401
    except ImportError:
        raise ValueError("logger=wandb needs the package wandb: pip install 'ssmzoo[wandb]'") from None
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
        raise ValueError(
            "logger=tensorboard needs the package tensorboard: pip install 'ssmzoo[tensorboard]'"
        ) from None
