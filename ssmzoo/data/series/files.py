"""One table of a series: CSV, text, NPY or Parquet -> columns of numbers, time stamps and labels, checked.

A name of TIME is the column of time stamps, one of LABEL that of labels, unless the user names others. Nothing in a
file is run: NPY is read without pickles.
"""

from __future__ import annotations

import csv
import warnings
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ssmzoo.suggest import nearest

TIME = ("time", "timestamp", "timestamp_(min)", "datetime", "date", "ts")
LABEL = ("label", "labels", "anomaly", "is_anomaly", "outlier", "attack", "normal/attack")
STAMPS = ("%d/%m/%Y %I:%M:%S %p", "%d/%m/%Y %H:%M:%S", "%d/%m/%Y %H:%M", "%m/%d/%Y %H:%M:%S", "%d.%m.%Y %H:%M:%S")
FALSE, TRUE = ("0", "0.0", "false", "normal", "no"), ("1", "1.0", "true", "attack", "a ttack", "anomaly", "yes")
KINDS = (".csv", ".txt", ".npy", ".parquet")


class Table(NamedTuple):
    """values (t c) float64 with NaN where nothing was written; labels (t) bool or None; times (t) or None."""

    names: list[str]
    values: np.ndarray
    labels: np.ndarray | None
    times: np.ndarray | None
    source: str


def read_table(path: Path, time: str | None = None, label: str | None = None) -> Table:
    """Read one file. Raises ValueError, naming file, row and column, for what is no series in the order of time."""
    if path.suffix.lower() not in KINDS:
        raise ValueError(f"{path} is no series; expected one of {', '.join(KINDS)}")
    read = {".npy": _read_npy, ".parquet": _read_parquet}.get(path.suffix.lower(), _read_text)
    names, columns = read(path)
    if not columns or not len(columns[0]):
        raise ValueError(f"{path} holds no rows")
    at_time, at_label = (_column(names, n, k, path) for n, k in ((time, TIME), (label, LABEL)))
    times = None if at_time is None else _times(columns[at_time], path)
    labels = None if at_label is None else to_labels(columns[at_label], f"{path}, column {names[at_label]}")
    kept = [i for i in range(len(names)) if i not in (at_time, at_label)]
    values = [_numbers(columns[i], f"{path}, column {names[i]}") for i in kept]
    table = np.stack(values, 1) if values else np.empty((len(columns[0]), 0))
    return Table([names[i] for i in kept], table, labels, times, str(path))


def to_labels(column: np.ndarray, where: str) -> np.ndarray:
    """0 and 1, false and true, Normal and Attack -> bool."""
    words = [_word(v) for v in column]
    strange = next((i for i, w in enumerate(words) if w not in FALSE + TRUE), None)
    if strange is not None:
        raise ValueError(f"{where}, row {strange + 1}: label {words[strange]!r}; expected 0 or 1 (or Normal, Attack)")
    return np.array([w in TRUE for w in words])


def _word(value) -> str:
    text = str(value).strip().lower()
    return text[:-2] if text.endswith(".0") else text


def _column(names: list[str], wanted: str | None, known: tuple[str, ...], path: Path) -> int | None:
    lower = [n.strip().lower() for n in names]
    if wanted is None:
        return next((i for i, n in enumerate(lower) if n in known), None)
    if wanted.lower() not in lower:
        raise ValueError(f"{path} has no column {wanted!r}{nearest(wanted, names)}; it has {', '.join(names)}")
    return lower.index(wanted.lower())


def _read_text(path: Path) -> tuple[list[str], list[np.ndarray]]:
    with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
        first = file.readline()
        between = next((d for d in (",", ";", "\t") if d in first), None) or (" " if " " in first.strip() else ",")
        start = next(csv.reader([first], delimiter=between, skipinitialspace=True), [])
        header = any(_number(cell) is None and cell.strip() for cell in start)
        names = [cell.strip() for cell in start] if header else [f"channel{i}" for i in range(len(start))]
        try:  # numbers and nothing else
            file.seek(0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a file without rows, which is refused in our words
                array = np.loadtxt(file, delimiter=between, skiprows=int(header), ndmin=2, comments=None)
            if array.shape[1] == len(names):
                return names, list(array.T)
        except ValueError:
            pass
        file.seek(0)
        rows = csv.reader(file, delimiter=between, skipinitialspace=True)
        body = [row for row in rows if any(cell.strip() for cell in row)][int(header) :]
    short = next((i for i, row in enumerate(body) if len(row) != len(names)), None)
    if short is not None:
        raise ValueError(f"{path}, row {short + 1}: {len(body[short])} cells, but {len(names)} columns")
    return names, [np.array(column, dtype=object) for column in zip(*body)]


def _read_npy(path: Path) -> tuple[list[str], list[np.ndarray]]:
    try:
        array = np.load(path, allow_pickle=False)
    except ValueError as error:
        raise ValueError(f"{path} is no array of numbers ({error})") from None
    if array.ndim not in (1, 2) or array.dtype.kind not in "biuf":
        raise ValueError(f"{path} holds an array {array.shape} of {array.dtype}; expected numbers of (time, channels)")
    array = array.reshape(len(array), -1)
    return [f"channel{i}" for i in range(array.shape[1])], list(array.T)


def _read_parquet(path: Path) -> tuple[list[str], list[np.ndarray]]:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError:
        raise ValueError(
            f"{path}: Parquet needs pyarrow: pip install '.[series]' in the checkout, or give CSV or NPY"
        ) from None
    try:
        table = parquet.read_table(path)
    except ArrowInvalid as error:
        raise ValueError(f"{path} is no Parquet file ({str(error).splitlines()[0]})") from None
    return list(table.column_names), [column.to_numpy() for column in table.columns]


def _numbers(column: np.ndarray, where: str) -> np.ndarray:
    if column.dtype.kind in "biuf":
        return column.astype(np.float64)
    try:
        return column.astype(np.float64)  # text of numbers only, by far the most common
    except (TypeError, ValueError):
        found = [_number(v) for v in column]
    strange = next(
        (i for i, v in enumerate(found) if v is None and str(column[i]).strip().lower() not in ("", "none")), None
    )
    if strange is not None:
        raise ValueError(f"{where}, row {strange + 1}: {str(column[strange])[:40]!r} is no number")
    return np.array([np.nan if v is None else v for v in found])


def _number(cell) -> float | None:
    try:
        return float(cell)
    except (TypeError, ValueError):
        return None


def _times(column: np.ndarray, path: Path) -> np.ndarray:
    """Numbers or datetime64, strictly rising."""
    times = _stamps(column, path)
    step = np.diff(times)
    for wrong, what in (
        (step == step.dtype.type(0), "is the one before again"),
        (step < step.dtype.type(0), "goes back"),
    ):
        if wrong.any():
            row = int(np.flatnonzero(wrong)[0]) + 1
            raise ValueError(
                f"{path}, row {row + 1}: the time stamp {str(column[row]).strip()} {what}; "
                f"sort the rows by time and keep one for each"
            )
    return times


def _stamps(column: np.ndarray, path: Path) -> np.ndarray:
    if column.dtype.kind in "biufM":
        return column
    words = [str(v).strip() for v in column]
    if all(_number(w) is not None for w in words):
        return np.array(words, dtype=np.float64)
    try:
        return np.array(words, dtype="datetime64[us]")
    except ValueError:
        pass
    for pattern in STAMPS:
        try:
            return np.array([datetime.strptime(w, pattern) for w in words], dtype="datetime64[us]")
        except ValueError:
            continue
    raise ValueError(f"{path}: time stamps like {words[0]!r} are not understood; give numbers or 2024-01-31 12:00:00")
