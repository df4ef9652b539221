"""The states that a model has learnt, and the nearest of them to a state that has drifted.

A recurrence over real numbers that emulates an automaton errs by a little at every symbol, and over thousands of
symbols the errors add up. Strings as long as the training's end in states that the model was trained to read, so that
going on from the nearest of these is as good as a string of that length, as long as a state is still nearest to one
that means the same. No label is used.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssmzoo.layers.state import map_state, select_rows


class LearntStates:
    """A codebook of states; state: a model's state of m rows, every tensor with the rows in front.

    Raises ValueError for a state whose size grows with the length: it holds the string itself.
    """

    def __init__(self, state: Any):
        self.state, self.rows = state, _rows(state)

    def nearest(self, state: Any) -> Any:
        """Of every row the nearest state of the codebook, by Euclidean distance over all its numbers."""
        rows = _rows(state)
        if rows.shape[1:] != self.rows.shape[1:]:
            raise ValueError(
                f"a state of {rows.shape[1]} numbers has none near it among states of {self.rows.shape[1]}: this "
                f"model's state grows with the string; leave task.long_snap at 0"
            )
        return select_rows(self.state, torch.cdist(rows, self.rows).argmin(1))


def _rows(state: Any) -> Tensor:
    """(rows, numbers)"""
    parts: list[Tensor] = []
    map_state(lambda t: parts.append(t.flatten(1).float()) or t, state)
    return torch.cat(parts, dim=1)
