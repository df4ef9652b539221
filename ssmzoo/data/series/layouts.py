"""From a file or a folder to training part, test part and labels.

    a file      its rows in time; the last `test_fraction` of them test; labels are a column
    a folder    train.*, test.* and test_label.* (or label, labels), also with a name in front (MSL_train.npy), or the
                labels as a column of the test file
                train/, test/, test_label/ with one file per entity (SMD as its authors publish it), or train/, test/
                and labeled_anomalies.csv (MSL and SMAP as theirs do); of several entities one is chosen, or all stand
                one behind the other

A named layout adds what is known of a published set: SMD, MSL, SMAP (the entities of one spacecraft), PSM (the first
column is a time, empty cells are 0), SWaT (the last column is the label).
Source of the layouts: the loaders of Anomaly Transformer and MAAT.
"""

from __future__ import annotations

import ast
import csv
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ssmzoo.data.series.files import KINDS, Table, read_table, to_labels
from ssmzoo.suggest import nearest

LAYOUTS = ("auto", "SMD", "MSL", "SMAP", "SWaT", "PSM")
MISSING = ("refuse", "zero", "interpolate")
LABEL_FOLDERS = ("test_label", "labels", "label")


class Parts(NamedTuple):
    """train, test (t c) float64, labels (t) bool of the test part or None, names of the channels, and where from."""

    train: np.ndarray
    test: np.ndarray
    labels: np.ndarray | None
    names: list[str]
    source: str


class Reading(NamedTuple):
    """How tables are read: layout, entity, names of the time, label and channel columns, what to do without a value."""

    layout: str = "auto"
    entity: str | None = None
    time: str | None = None
    label: str | None = None
    channels: list[str] | None = None
    missing: str = "refuse"
    test_fraction: float = 0.5

    def table(self, path: Path) -> Table:
        return read_table(path, self.time, self.label)


def read_parts(path: str, how: Reading) -> Parts:
    """Raises ValueError for what is missing, of unequal width or length, or not a number."""
    place = Path(path).expanduser()
    if not place.exists():
        raise ValueError(f"data.path = {path!r}: there is no such file or folder")
    train, test, labels = _folder(place, how) if place.is_dir() else _split(how.table(place), how)
    names = _same_columns(train, test)
    if how.layout == "SWaT" and labels is None:
        labels = to_labels(test.values[:, -1], f"{test.source}, column {names[-1]}")
        names = names[:-1]
    if how.layout == "PSM" and train.times is None:
        names = names[1:]
    names = _chosen(names, how.channels)
    columns = [train.names.index(n) for n in names]
    parts = [_filled(t, columns, how) for t in (train, test)]
    if labels is not None and len(labels) != len(parts[1]):
        raise ValueError(f"{len(labels)} labels for the {len(parts[1])} points of {test.source}; both must be as long")
    return Parts(*parts, labels, names, str(place) + (f", {how.entity}" if how.entity else ""))


def _split(table: Table, how: Reading) -> tuple[Table, Table, np.ndarray | None]:
    cut = round(len(table.values) * (1 - how.test_fraction))
    labels = None if table.labels is None else table.labels[cut:]
    return table._replace(values=table.values[:cut]), table._replace(values=table.values[cut:]), labels


def _folder(place: Path, how: Reading) -> tuple[Table, Table, np.ndarray | None]:
    if (place / "train").is_dir() and (place / "test").is_dir():
        return _entities(place, how)
    found = sorted(f for f in place.iterdir() if f.suffix.lower() in KINDS)
    own = [f for f in found if f.stem.lower().startswith(how.layout.lower())]
    files = {"train": None, "test": None, "label": None}
    for file in own or found:
        stem = file.stem.lower()
        kind = "label" if "label" in stem else "train" if "train" in stem else "test" if "test" in stem else None
        kind = kind or ("test" if how.layout == "SWaT" else None)
        if kind and files[kind] is not None:
            raise ValueError(f"{place} holds {files[kind].name} and {file.name}; which is the {kind} part?")
        if kind:
            files[kind] = file
    lacking = [k for k in ("train", "test") if files[k] is None]
    if lacking:
        names = ", ".join(f.name for f in found) or "no series"
        raise ValueError(
            f"{place} lacks {' and '.join(f'{k}.csv' for k in lacking)} (or .npy, .parquet); there: {names}"
        )
    train, test = how.table(files["train"]), how.table(files["test"])
    return train, test, test.labels if files["label"] is None else _labels(files["label"])


def _labels(file: Path) -> np.ndarray:
    """The only column beside a time, or the one with a label's name."""
    table = read_table(file)
    if table.labels is not None:
        return table.labels
    if table.values.shape[1] not in (1, 2):
        raise ValueError(f"{file} has {table.values.shape[1]} columns of labels; expected one")
    return to_labels(table.values[:, -1], str(file))


def _entities(place: Path, how: Reading) -> tuple[Table, Table, np.ndarray | None]:
    names = sorted({f.stem for f in (place / "test").iterdir() if f.suffix.lower() in KINDS})
    listed = _telemetry(place / "labeled_anomalies.csv")
    if listed and how.layout in ("MSL", "SMAP"):
        names = [n for n in names if n in listed and listed[n][0] == how.layout]
    if how.entity is not None:
        if how.entity not in names:
            raise ValueError(
                f"data.entity = {how.entity!r}{nearest(how.entity, names)}; {place} has {', '.join(names)}"
            )
        names = [how.entity]
    if not names:
        raise ValueError(f"{place}/test holds no series of layout {how.layout}")
    train, test, labels = [], [], []
    folder = next((place / f for f in LABEL_FOLDERS if (place / f).is_dir()), None)
    for name in names:
        pair = [how.table(_one(place / part, name)) for part in ("train", "test")]
        train, test = [*train, pair[0]], [*test, pair[1]]
        if folder is not None:
            labels.append(_labels(_one(folder, name)))
        elif name in listed:
            labels.append(_marked(listed[name][1], len(pair[1].values), name))
        elif pair[1].labels is not None:
            labels.append(pair[1].labels)
        if labels and len(labels[-1]) != len(pair[1].values):
            raise ValueError(f"{len(labels[-1])} labels for the {len(pair[1].values)} points of {pair[1].source}")
    whole = [_joined(tables) for tables in (train, test)]
    return *whole, np.concatenate(labels) if len(labels) == len(names) else None


def _one(folder: Path, name: str) -> Path:
    file = next((folder / f"{name}{kind}" for kind in KINDS if (folder / f"{name}{kind}").is_file()), None)
    if file is None:
        raise ValueError(f"{folder} has no {name}.csv (or {', '.join(KINDS[1:])})")
    return file


def _joined(tables: list[Table]) -> Table:
    for table in tables[1:]:
        _same_columns(tables[0], table)
    return tables[0]._replace(values=np.concatenate([t.values for t in tables]))


def _telemetry(file: Path) -> dict[str, tuple[str, list]]:
    """{channel: (spacecraft, [[first, last], ...])} of the list that MSL and SMAP come with."""
    if not file.is_file():
        return {}
    found: dict[str, tuple[str, list]] = {}
    with open(file, newline="", encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            try:
                spans = ast.literal_eval(row["anomaly_sequences"])
                found[row["chan_id"]] = (row["spacecraft"], found.get(row["chan_id"], ("", []))[1] + list(spans))
            except (KeyError, ValueError, SyntaxError, TypeError):
                raise ValueError(
                    f"{file}: {row} has no chan_id, spacecraft and anomaly_sequences [[a, b], ...]"
                ) from None
    return found


def _marked(spans: list, length: int, name: str) -> np.ndarray:
    labels = np.zeros(length, dtype=bool)
    for first, last in spans:
        if not 0 <= first <= last < length:
            raise ValueError(f"labeled_anomalies.csv marks {first} to {last} of {name}, which has {length} points")
        labels[first : last + 1] = True
    return labels


def _same_columns(train: Table, test: Table) -> list[str]:
    if train.values.shape[1] != test.values.shape[1]:
        counts = f"{train.values.shape[1]} and {test.values.shape[1]}"
        raise ValueError(f"{train.source} and {test.source} have {counts} channels; both must have the same")
    if sorted(train.names) == sorted(test.names) and train.names != test.names:
        raise ValueError(f"{test.source} has the channels of {train.source} in another order; write them in one order")
    return train.names


def _chosen(names: list[str], channels: list[str] | None) -> list[str]:
    for name in channels or ():
        if name not in names:
            raise ValueError(f"data.channels: no channel {name!r}{nearest(name, names)}; there: {', '.join(names)}")
    if not names:
        raise ValueError("the series has no channel beside time and label")
    return list(channels or names)


def _filled(table: Table, columns: list[int], how: Reading) -> np.ndarray:
    """The chosen columns, with what stands for empty cells; ValueError when that is to refuse them."""
    values = table.values[:, columns].copy()
    missing = "zero" if how.layout == "PSM" and how.missing == "refuse" else how.missing
    if np.isinf(values).any():
        row, column = np.argwhere(np.isinf(values))[0]
        raise ValueError(f"{table.source}, row {row + 1}, {table.names[columns[column]]}: an infinite value")
    empty = np.isnan(values)
    if empty.any() and missing == "refuse":
        row, column = np.argwhere(empty)[0]
        raise ValueError(
            f"{table.source}, row {row + 1}, {table.names[columns[column]]}: no value (NaN), the first of "
            f"{int(empty.sum())}; choose data.missing=zero or data.missing=interpolate"
        )
    if missing == "zero":
        values[empty] = 0
    for column in np.flatnonzero(empty.any(0)) if missing == "interpolate" else ():
        known = np.flatnonzero(~empty[:, column])
        if not len(known):
            raise ValueError(f"{table.source}, {table.names[columns[column]]}: no value at all to interpolate from")
        values[:, column] = np.interp(np.arange(len(values)), known, values[known, column])
    return values
