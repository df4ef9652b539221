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
    """A codebook of states; states: a model's, every tensor with the rows in front.

    Raises ValueError for states whose size grows with the length: they hold the string itself.
    """

    def __init__(self, *states: Any):
        rows = [_rows(state) for state in states]
        _check_same_size(*rows)
        self.rows = torch.cat(rows)
        tensors = map(torch.cat, zip(*map(_tensors, states)))
        self.state = map_state(lambda _: next(tensors), states[0])

    def nearest(self, state: Any) -> Any:
        """Of every row the nearest state of the codebook, by Euclidean distance over all its numbers."""
        rows = _rows(state)
        _check_same_size(self.rows, rows)
        return select_rows(self.state, torch.cdist(rows, self.rows).argmin(1))


def _tensors(state: Any) -> list[Tensor]:
    parts: list[Tensor] = []
    map_state(lambda t: parts.append(t) or t, state)
    return parts


def _rows(state: Any) -> Tensor:
    """(rows, numbers)"""
    return torch.cat([t.flatten(1).float() for t in _tensors(state)], dim=1)


def _check_same_size(*rows: Tensor) -> None:
    sizes = {r.shape[1] for r in rows}
    if len(sizes) > 1:
        raise ValueError(
            f"a state of {max(sizes)} numbers has none near it among states of {min(sizes)}: this model's state grows "
            f"with the string; leave task.long_snap at 0"
        )
