"""Positions of tokens in their documents, from call to call, with packed and padded rows.

A layer that needs them keeps `done` (b) in its state: how many tokens of the open document it has seen.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ssmzoo.layers.state import Padding


def document_positions(
    b: int, l: int, device: torch.device, done: Tensor | None = None, seq_idx: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(b l): position of every token in its document, and the document's number in the call (0 continues the open one).

    done (b) tokens of the open document before this call, None for zero | seq_idx (b l) changes where a document begins
    """
    if l == 1 and done is not None:  # whatever its number, the first token of a call continues the open document
        return done[:, None], torch.zeros_like(done[:, None])
    slot = torch.arange(l, device=device).expand(b, l)
    before = 0 if done is None else done[:, None]
    if seq_idx is None:
        return slot + before, torch.zeros_like(slot)
    new = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))
    document = new.cumsum(1)
    start = torch.where(new, slot, 0).cummax(1).values
    return torch.where(document == 0, slot + before, slot - start), document


def tokens_done(position: Tensor, done: Tensor | None = None, padding: Padding | None = None) -> Tensor:
    """Tokens of the last document after a call, (b): one more than the position of the last real token."""
    if padding is None:
        return position[:, -1] + 1
    last = position.gather(1, (padding.lengths - 1).clamp(min=0)[:, None])[:, 0] + 1
    return torch.where(padding.lengths > 0, last, 0 if done is None else done)
