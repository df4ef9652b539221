"""What a model without context reaches: has a language model learnt anything beyond frequencies?"""

from __future__ import annotations

from typing import Protocol

import numpy as np


class CountedText(Protocol):
    """A corpus with token counts (v) of its splits "train" and "val", such as ssmzoo.data.text.TextData."""

    def token_counts(self, split: str) -> np.ndarray: ...

    def bytes_per_token(self, split: str) -> float: ...


def unigram_bits_per_token(train_counts: np.ndarray, val_counts: np.ndarray) -> float:
    """Cross-entropy of an order-0 model in bits per token, with add-one smoothing.

        H = - sum_i val_i / |val| * log2((train_i + 1) / (|train| + v))

    Both counts (v). Raises ValueError when their shapes disagree or nothing is held out.
    """
    train, val = np.asarray(train_counts, dtype=np.float64), np.asarray(val_counts, dtype=np.float64)
    if train.shape != val.shape or train.ndim != 1:
        raise ValueError(f"counts have shapes {train.shape} and {val.shape}; both must be (vocab_size,)")
    if val.sum() == 0:
        raise ValueError("val_counts are all zero; there is nothing to predict")
    probability = (train + 1) / (train.sum() + len(train))
    return float(-(val * np.log2(probability)).sum() / val.sum())


def unigram_bits_per_byte(data: CountedText) -> float:
    """Bits per byte of the held-out text under the frequencies of the training text."""
    bits = unigram_bits_per_token(data.token_counts("train"), data.token_counts("val"))
    return bits / data.bytes_per_token("val")
