"""States of many sequences in one tensor, of which a call reads and writes some rows: continuous batching.

`indices` (b) integers says which row every sequence of the batch has; a negative one marks padding, which reads zeros
and writes nothing. No index may come twice. None stands for row i for sequence i.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssmzoo.ops.checks import expect


def expect_indices(name: str, indices: Tensor | None, device: torch.device, sizes: dict[str, int]) -> None:
    """Check what is known without reading them: (b) integers on `device`."""
    if indices is None:
        return
    expect(name, indices, ("b",), sizes)
    if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
        raise ValueError(f"{name} has dtype {indices.dtype}, expected an integer dtype such as int32")
    if indices.device != device:
        raise ValueError(f"{name} is on {indices.device}, expected {device}")


def _padding(indices: Tensor, like: Tensor) -> Tensor:
    """(b 1 ...) bool with as many axes as `like`."""
    return (indices < 0).view(-1, *[1] * (like.ndim - 1))


def read_rows(states: Tensor, indices: Tensor | None) -> Tensor:
    """The rows (b ...) of the batch: `states` itself without indices, else a copy."""
    if indices is None:
        return states
    return states[indices.long().clamp(min=0)].masked_fill(_padding(indices, states), 0)


def write_rows(states: Tensor, indices: Tensor | None, rows: Tensor) -> None:
    """Put rows (b ...) where they belong, in place."""
    if indices is None:
        states.copy_(rows)
        return
    kept = (indices >= 0).nonzero().squeeze(1)
    states.index_copy_(0, indices[kept].long(), rows[kept].to(states.dtype))


def without_padding(y: Tensor, indices: Tensor | None) -> Tensor:
    """A result (b ...) with zeros for padding."""
    return y if indices is None else y.masked_fill(_padding(indices, y), 0)


def checked(indices: Tensor | None, states: Tensor) -> Tensor | None:
    """Indices for a kernel that reads memory by them: IndexError for a row that does not exist."""
    if indices is not None and len(indices) and int(indices.max()) >= len(states):
        raise IndexError(f"row {int(indices.max())} of a state with {len(states)} rows was asked for")
    return indices
