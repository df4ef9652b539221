"""Several samples in one row: what is read, what is answered, and which positions may be read in both directions.

    input_ids       prefix ids   start   labels but the last     next sample ...   0 0 0
    labels          -100 ...     the labels                                        -100
    attention_mask  1 1 1        3       3 3 3                   1 1 ...           0 0 0
    segment_ids     1 1 1        1       1 1 1                   2 2 ...           0 0 0

The start token predicts the first label; it belongs to the labels' region (3), which is read forwards.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from ssmzoo.data.birdie.objectives import Sample

IGNORE = -100


class Row(NamedTuple):
    """All (length) int64."""

    input_ids: np.ndarray
    labels: np.ndarray
    attention_mask: np.ndarray
    segment_ids: np.ndarray

    @property
    def prefix(self) -> np.ndarray:
        """(length) bool: what a model may read in both directions, the inputs and the start token behind them.

        The last input thereby sees the start token, which is the same everywhere; nothing sees a label.
        """
        inside = self.attention_mask == 1
        inside[1:] |= (self.attention_mask[1:] == 3) & (self.attention_mask[:-1] == 1)
        return inside


def pack(samples: Iterable[Sample], length: int, start_id: int) -> Row:
    """The samples one behind another. Raises ValueError when they do not fit."""
    row = Row(np.zeros(length, int), np.full(length, IGNORE), np.zeros(length, int), np.zeros(length, int))
    at = 0
    for number, sample in enumerate(samples, 1):
        middle, end = at + len(sample.inputs), at + len(sample.inputs) + len(sample.labels)
        if end > length or not len(sample.labels):
            raise ValueError(f"a sample of {end - at} ids and {length - at} free of {length}; it must fit and ask")
        row.input_ids[at:end] = [*sample.inputs, start_id, *sample.labels[:-1]]
        row.labels[middle:end] = sample.labels
        row.attention_mask[at:middle], row.attention_mask[middle:end] = 1, 3
        row.segment_ids[at:end] = number
        at = end
    return row
