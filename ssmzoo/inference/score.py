"""Log-likelihood of texts under a language model, token by token."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ssmzoo.inference.subject import Subject


@dataclass(frozen=True)
class Score:
    """pieces: the text of each token; log_likelihoods: natural logarithm of its probability after those before it,
    None for the first, which has nothing before it."""

    pieces: list[str]
    log_likelihoods: list[float | None]

    @property
    def total(self) -> float:
        """nats"""
        return math.fsum(v for v in self.log_likelihoods if v is not None)

    @property
    def perplexity(self) -> float:
        """Per token; infinite when the mean overflows."""
        count = len(self.pieces) - 1
        mean = -self.total / count if count else 0.0
        return math.exp(mean) if mean < 700 else math.inf


@torch.inference_mode()
def score(subject: Subject, text: str, chunk: int = 2048) -> Score:
    """The score of one text, read in pieces of `chunk` tokens with the state carried: any length in the same memory.

    Raises ValueError for a model without a tokenizer, a text without tokens, and logits that are no numbers.
    """
    if subject.tokenizer is None:
        raise ValueError(f"{subject.name} holds {type(subject.model).__name__} without a tokenizer: no language model")
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}; it must be at least 1")
    ids = list(subject.tokenizer.encode(text))
    if not ids:
        raise ValueError("the text is empty; give at least one character")
    device = next(subject.model.parameters()).device
    tokens, state, found = torch.tensor([ids], device=device), None, []
    for start in range(0, len(ids) - 1, chunk):
        part = tokens[:, start : min(start + chunk, len(ids) - 1)]
        logits, state, _ = subject.model(part, state)
        wanted = tokens[:, start + 1 : start + 1 + part.shape[1], None]
        logits = logits[..., : subject.tokenizer.vocab_size].double()  # rows that pad the vocabulary are no tokens
        found += logits.log_softmax(-1).gather(-1, wanted)[0, :, 0].tolist()
    if any(v != v for v in found):
        raise ValueError("the model's logits are NaN; its weights are not usable")
    return Score(pieces_of(subject.tokenizer, ids), [None, *found])


def pieces_of(tokenizer, ids: list[int]) -> list[str]:
    """The text that each token completes; bytes of an unfinished character belong to the token that ends it."""
    decoder = tokenizer.decoder()
    pieces = [decoder.push([i]) for i in ids]
    pieces[-1] += decoder.flush()
    return pieces


COLOURS = (22, 28, 34, 100, 136, 130, 124, 88)  # of 256: green for the expected to red for the surprising
STEP = 1.5  # nats per colour


def coloured(found: Score) -> str:
    """The text with a background per token, by its surprise (256-colour codes)."""
    parts = []
    for piece, value in zip(found.pieces, found.log_likelihoods):
        shade = COLOURS[min(len(COLOURS) - 1, int(-value / STEP))] if value is not None else None
        parts.append(piece if shade is None else f"\x1b[48;5;{shade}m{piece}\x1b[0m")
    return "".join(parts)
