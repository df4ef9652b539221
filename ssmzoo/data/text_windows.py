"""Windows of fixed length over a stream of packed documents."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ssmzoo.data.loader import Draw, draw_seed
from ssmzoo.data.text_store import Split

IGNORE = -100  # label of positions that are not trained, torch's convention


class Windows(Dataset):
    """Cut the tokens of a split into windows so that one epoch predicts every token exactly once.

    The documents lie behind one another on a ring of n tokens; an epoch starts at a position that (seed, epoch) decide
    and goes round once. What the last window holds beyond the round is not trained.

        tokens     d e f | a b c d e | f g      two boundaries in a window of six:
        input_ids  e f a b c d
        labels     f . b c d e                  "." is -100: the next token is of another document
        seq_idx    0 0 1 1 1 1

    seq_len      positions per window
    seed         None: every epoch starts at the first token
    limit        use the first so many tokens only
    multiple_of  fill up with windows without labels to a multiple of this number, so that ranks get equally many
    Item: {"input_ids" (l) int64, "labels" (l) int64, "seq_idx" (l) int32}
    """

    def __init__(
        self, split: Split, seq_len: int, *, seed: int | None = None, limit: int | None = None, multiple_of: int = 1
    ):
        self.split, self.seq_len, self.seed = split, seq_len, seed
        self.n = min(limit or len(split.tokens), len(split.tokens))
        self.length = -(-self.n // (seq_len * multiple_of)) * multiple_of

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, draw: Draw) -> dict[str, Tensor]:
        start = 0 if self.seed is None else draw_seed(self.seed, draw.epoch, -2) % self.n
        position = draw.index * self.seq_len + np.arange(self.seq_len + 1)  # in this epoch's round
        at = (position + start) % self.n  # on the ring
        tokens = torch.from_numpy(self.split.tokens[at].astype(np.int64))
        document = np.searchsorted(self.split.starts, at, side="right")
        boundary = (document[1:] != document[:-1]) | (at[1:] == 0)
        labels = tokens[1:].clone()
        labels[torch.from_numpy(boundary | (position[:-1] >= self.n))] = IGNORE
        seq_idx = np.concatenate([[0], boundary[:-1].cumsum()]).astype(np.int32)
        return {"input_ids": tokens[:-1], "labels": labels, "seq_idx": torch.from_numpy(seq_idx)}
