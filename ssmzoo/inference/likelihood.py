"""Exact log-likelihoods of token sequences, read in pieces with the state carried from one to the next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ssmzoo.inference.generate import pad_left


class Likelihood(NamedTuple):
    """logprobs (n) in nats of the last n tokens, each given all before it; greedy: whether each was the likeliest."""

    logprobs: Tensor
    greedy: bool

    @property
    def total(self) -> float:
        return float(self.logprobs.double().sum())


@torch.no_grad()
def log_likelihoods(
    model: nn.Module, sequences: Sequence[Sequence[int]], scored: Sequence[int], chunk: int = 2048
) -> list[Likelihood]:
    """Of every sequence (at least two tokens) the log-probabilities of its last `scored` tokens, in one batch.

    chunk  tokens per pass: memory does not grow with the length. Raises ValueError for counts that do not fit.
    """
    for i, (sequence, n) in enumerate(zip(sequences, scored, strict=True)):
        if not 0 < n < len(sequence):
            raise ValueError(
                f"sequence {i} has {len(sequence)} tokens, of which {n} cannot be scored: its first has none before it"
            )
    device = next(model.parameters()).device
    ids, mask = pad_left([list(s)[:-1] for s in sequences], device)
    targets, _ = pad_left([list(s)[1:] for s in sequences], device)
    b, length = ids.shape
    wanted = torch.arange(length, device=device) >= length - torch.as_tensor(scored, device=device)[:, None]  # (b l)
    found, best, state = [], [], None
    for start in range(0, length, chunk):
        part = slice(start, start + chunk)
        logits, state, _ = model(ids[:, part], state, mask=None if mask is None else mask[:, part])
        if wanted[:, part].any():
            logprobs, now = logits.float().log_softmax(-1), targets[:, part]
            found.append(logprobs.gather(-1, now[..., None])[..., 0])
            best.append(logprobs.argmax(-1) == now)
        else:
            found.append(logits.new_zeros(b, ids[:, part].shape[1], dtype=torch.float32))
            best.append(torch.ones_like(wanted[:, part]))
    logprobs, right = torch.cat(found, dim=1).cpu(), (torch.cat(best, dim=1) | ~wanted).all(1).tolist()
    return [Likelihood(logprobs[i, length - n :], right[i]) for i, n in enumerate(scored)]
