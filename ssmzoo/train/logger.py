"""metrics.csv: a row per logged step, which survives full disks, kills and resumes."""

from __future__ import annotations

import csv
import io
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
    """One row per logged step in <run>/metrics.csv; a row's step is the number of updates done."""

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
    def continue_after(self, step: int, counted_from_zero: bool = False) -> None:
        """Forget what an earlier process logged beyond the checkpoint at `step` that the run goes on from.

        counted_from_zero  the rows are older ones, of which the first update's has step 0
        """
        if counted_from_zero:
            for row in self._rows:
                row["step"] += 1
            self._written = 0
        kept = [row for row in self._rows if row["step"] <= step]
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
