"""A time series as a LightningDataModule: windows to train on, parts to score."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import Dataset

from ssmzoo.data.loader import Draw, ResumableLoader, refuse_other_data
from ssmzoo.data.series.layouts import LAYOUTS, MISSING, Parts, Reading, read_parts
from ssmzoo.data.series.recording import inject, recording
from ssmzoo.suggest import nearest


class Windows(Dataset):
    """{"x": (window c) float32} at every one of `starts` in values (t c)."""

    def __init__(self, values: Tensor, starts: list[int] | range, window: int):
        self.values, self.starts, self.window = values, starts, window

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, draw: Draw) -> dict[str, Tensor]:
        start = self.starts[draw.index]
        return {"x": self.values[start : start + self.window]}


class Part(NamedTuple):
    """A part to score: values (t c) standardised, where its windows start, labels (t) bool or None."""

    values: Tensor
    starts: list[int] | range
    labels: np.ndarray | None


class SeriesData(LightningDataModule):
    """Windows (b l c) of a series whose channels are standardised by mean and deviation of the training part.

    path           file (.csv .txt .npy .parquet) or folder, see layouts.py; None: the recording in recording.py
    layout         auto, or a published set: SMD, MSL, SMAP, SWaT, PSM;  entity  one of several (machine-1-1)
    time, label    columns of time stamps and of labels, when they have other names than usual
    channels       names of the columns to use; None: all
    missing        cells without a value: refuse, zero, or interpolate
    test_fraction  share of a single file that is test
    per_kind       anomalies of each kind in the embedded recording
    window, stride points per window and between the starts of training windows
    validation     train: the last `val_fraction` of the training part, never trained on, in windows side by side
                   test: the test part at the training stride, as both released systems stop and choose by (it is looked
                   at before it is tested on)
    score_stride   between windows of the training part when it is scored for the threshold; None: side by side
    tail           cover: one more window ends at the last point; drop: points behind the last whole window are left out
    batch_size, seed

    A batch is {"x" (b window c)}. Raises ValueError for a series shorter than a window, without a value, with labels of
    another length, with time stamps that do not rise.
    """

    default_task = "anomaly"

    def __init__(
        self,
        path: str | None = None,
        layout: str = "auto",
        entity: str | None = None,
        time: str | None = None,
        label: str | None = None,
        channels: list[str] | None = None,
        missing: str = "refuse",
        test_fraction: float = 0.5,
        per_kind: int = 2,
        window: int = 100,
        stride: int = 1,
        validation: str = "train",
        val_fraction: float = 0.2,
        score_stride: int | None = None,
        tail: str = "cover",
        batch_size: int = 16,
        seed: int = 0,
    ):
        super().__init__()
        for name, value, known in (
            *(("layout", layout, LAYOUTS), ("missing", missing, MISSING)),
            *(("validation", validation, ("train", "test")), ("tail", tail, ("cover", "drop"))),
        ):
            if value not in known:
                raise ValueError(
                    f"data.{name} = {value!r}{nearest(str(value), known)}; choose one of {', '.join(known)}"
                )
        counts = {"window": window, "stride": stride, "score_stride": score_stride, "batch_size": batch_size}
        for name, value in (counts | {"per_kind": per_kind}).items():
            if value is not None and value < 1:
                raise ValueError(f"data.{name} = {value}; it must be at least 1")
        if window < 2 or not (0 < val_fraction < 1 and 0 < test_fraction < 1):
            raise ValueError("data.window must be at least 2, data.val_fraction and data.test_fraction between 0 and 1")
        own = {"layout": layout != "auto", "entity": entity, "time": time, "label": label, "channels": channels}
        for name in [name for name, value in own.items() if value] if path is None else ():
            raise ValueError(f"data.{name} goes with data.path; without one the embedded recording is read")
        self.reading = Reading(layout, entity, time, label, channels, missing, test_fraction)
        self.path, self.per_kind, self.window, self.stride = path, per_kind, window, stride
        self.validation, self.val_fraction, self.score_stride, self.tail = validation, val_fraction, score_stride, tail
        self.batch_size, self.seed = batch_size, seed
        self.parts: Parts | None = None
        self.notes: list[str] = []  # what a reader of the report should know about the series

    def setup(self, stage: str | None = None) -> None:
        if self.parts is not None:
            return
        parts = self._embedded() if self.path is None else read_parts(self.path, self.reading)
        held = 0 if self.validation == "test" else round(len(parts.train) * self.val_fraction)
        self._cut = len(parts.train) - held
        pieces = {"training part": self._cut, "test part": len(parts.test)} | (
            {"validation slice": held} if held else {}
        )
        for name, length in pieces.items():
            if length < self.window:
                raise ValueError(
                    f"the {name} of {parts.source} has {length} points, fewer than data.window = {self.window}; "
                    f"lower data.window, or change data.val_fraction or data.test_fraction"
                )
        if parts.labels is not None and not parts.labels.any():
            self._note("the labels mark no anomaly: scores and threshold are given, no precision or recall")
            parts = parts._replace(labels=None)
        self.parts, self._scaled = parts, self._standardised(parts)

    def _embedded(self) -> Parts:
        train, test = recording()
        test, labels, done = inject(test, float(train.std()), self.per_kind, self.seed)
        self.notes += ["injected: " + "; ".join(done)]
        return Parts(train, test, labels, ["membrane"], "a neuron's membrane potential with injected anomalies")

    def _standardised(self, parts: Parts) -> tuple[Tensor, Tensor]:
        mean, deviation = parts.train.mean(0), parts.train.std(0)
        flat = deviation <= 1e-12 * np.maximum(1, np.abs(mean))
        if flat.all():
            raise ValueError(
                f"every channel of the training part of {parts.source} is constant; there is nothing to learn"
            )
        if flat.any():
            names = ", ".join(n for n, f in zip(parts.names, flat) if f)
            self._note(f"constant in the training part, so centred and not scaled: {names}")
        scale = np.where(flat, 1, deviation)
        return tuple(torch.from_numpy(((part - mean) / scale).astype(np.float32)) for part in (parts.train, parts.test))

    def _note(self, text: str) -> None:
        print(f"data: {text}", flush=True)
        self.notes.append(text)

    @property
    def sizes(self) -> dict[str, int]:
        return {"enc_in": len(self.parts.names)}

    def describe(self) -> dict:
        whole = hashlib.sha256(self._scaled[0].numpy().tobytes() + self._scaled[1].numpy().tobytes()).hexdigest()
        return {"series": self.parts.source, "sha256": whole, "window": self.window, "stride": self.stride}

    state_dict = describe

    def load_state_dict(self, state: dict) -> None:
        refuse_other_data(self, state)

    def train_dataloader(self) -> ResumableLoader:
        starts = range(0, self._cut - self.window + 1, self.stride)
        windows = Windows(self._scaled[0], starts, self.window)
        return self._loader(windows, shuffle=True, drop_last=len(windows) >= self.batch_size)

    def val_dataloader(self) -> ResumableLoader:
        if self.validation == "test":
            starts = range(0, len(self._scaled[1]) - self.window + 1, self.stride)
            return self._loader(Windows(self._scaled[1], starts, self.window))
        held = self._scaled[0][self._cut :]
        return self._loader(Windows(held, self._side_by_side(len(held)), self.window))

    def part(self, name: str) -> Part:
        """train (all of it) or test, to be scored."""
        if name == "test":
            return self._labelled(self._scaled[1], self.parts.labels)
        values, stride = self._scaled[0], self.score_stride
        starts = self._side_by_side(len(values)) if stride is None else range(0, len(values) - self.window + 1, stride)
        return Part(values, starts, None)

    def windows(self, part: Part) -> ResumableLoader:
        return self._loader(Windows(part.values, part.starts, self.window))

    def _labelled(self, values: Tensor, labels: np.ndarray | None) -> Part:
        starts = self._side_by_side(len(values))
        kept = max(starts) + self.window  # the rest, with tail=drop, is not scored
        return Part(values[:kept], starts, None if labels is None else labels[:kept])

    def _side_by_side(self, length: int) -> list[int]:
        starts = list(range(0, length - self.window + 1, self.window))
        behind = length - starts[-1] - self.window
        return starts + ([length - self.window] if behind and self.tail == "cover" else [])

    def _loader(self, windows: Windows, shuffle: bool = False, drop_last: bool = False) -> ResumableLoader:
        trainer = self.trainer
        rank, world = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        return ResumableLoader(
            windows,
            self.batch_size,
            shuffle=shuffle,
            drop_last=drop_last,
            seed=self.seed,
            rank=rank,
            world_size=world,
        )
