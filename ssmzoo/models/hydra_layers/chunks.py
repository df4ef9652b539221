"""Chunks of c tokens of a document, counted from its beginning, however the tokens arrive.

A token may know the sum over the chunk before its own. A call sees, in every row, the chunk before the open one (number
0), the open one (1), which earlier calls began, and new ones (2, 3, ...).

b batch, l length, d width, s chunks that a call may see.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ssmzoo.layers.position import document_positions, tokens_done
from ssmzoo.layers.state import Padding


class ChunkState(NamedTuple):
    previous: Tensor  # (b d) sum over the chunk before the open one
    open: Tensor  # (b d) sum over the tokens of the open chunk so far
    done: Tensor  # (b) tokens of the open document so far


class Chunks(NamedTuple):
    """number (b l) of every token's chunk | first (b l) the token is in its document's first chunk
    begins (b s) the chunk begins a document | sums (b s d) | last (b) number of the chunk that stays open | state"""

    number: Tensor
    first: Tensor
    begins: Tensor
    sums: Tensor
    last: Tensor
    state: ChunkState


def chunks(
    x: Tensor, size: int, state: ChunkState | None = None, padding: Padding | None = None, seq_idx: Tensor | None = None
) -> Chunks:
    """Cut x (b l d) into chunks of `size` tokens."""
    b, l, d = x.shape
    done = None if state is None else state.done
    position, _ = document_positions(b, l, x.device, done, seq_idx)
    start = position % size == 0
    if padding is not None:
        start, x = start & padding.mask, x * padding.mask[..., None]
    number = 1 + start.cumsum(1)
    s = l // size + 3 if seq_idx is None else l + 2
    before = x.new_zeros(b, 2, d) if state is None else torch.stack([state.previous, state.open], dim=1).to(x.dtype)
    sums = torch.cat([before, x.new_zeros(b, s - 2, d)], dim=1)
    sums = sums.flatten(0, 1).index_add(0, rows_of(number, s), x.flatten(0, 1)).view(b, s, d)
    begins = torch.zeros(b, s, dtype=torch.long, device=x.device)
    begins = begins.scatter_add(1, number, (start & (position == 0)).long()) > 0
    last = number[:, -1]
    after = ChunkState(of_chunk(sums, last - 1), of_chunk(sums, last), tokens_done(position, done, padding))
    return Chunks(number, position < size, begins, sums, last, after)


def rows_of(number: Tensor, s: int) -> Tensor:
    """Chunks' numbers (b ...) -> those of their rows among (b s), flat."""
    first = s * torch.arange(len(number), device=number.device)
    return (number + first.view(-1, *[1] * (number.ndim - 1))).flatten()


def of_chunk(values: Tensor, number: Tensor) -> Tensor:
    """values (b s d) at chunk number (b) -> (b d), or number (b l) -> (b l d)."""
    found = values.flatten(0, 1).index_select(0, rows_of(number, values.shape[1]))
    return found.view(*number.shape, values.shape[-1])
