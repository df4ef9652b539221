"""Selective copying, induction heads, and questions about bits.

Sources: Gu & Dao 2023 (arXiv 2312.00752, sections 3.1 and 4.1); bits: HazyResearch/zoology `data/circuits.py`.
Every function returns (inputs (n length), labels (n length)), int64; labels are -100 where nothing is asked.
"""

from __future__ import annotations

import numpy as np

from ssmzoo.data.recall.associative import IGNORE, Arrays
from ssmzoo.data.recall.draws import Draws


def selective_copying(draws: Draws, n: int, length: int, tokens: int, vocab_size: int) -> Arrays:
    """`tokens` tokens at random positions among zeros; then as many markers (v - 1), where they are asked in order."""
    where = np.sort(draws.distinct(0, length - tokens, n, tokens), axis=1)
    content = draws.integers(1, vocab_size - 1, (n, tokens))
    inputs = np.zeros((n, length), dtype=np.int64)
    labels = np.full((n, length), IGNORE, dtype=np.int64)
    np.put_along_axis(inputs, where, content, 1)
    inputs[:, length - tokens :] = vocab_size - 1
    labels[:, length - tokens :] = content
    return inputs, labels


def induction_heads(draws: Draws, n: int, length: int, heads: int, vocab_size: int) -> Arrays:
    """Random tokens, a special one (v - 1) among them once and again at the end: label there, what followed it."""
    inputs = draws.integers(0, vocab_size - 1, (n, length))
    where, rows = draws.integers(0, length - 2, (n,)), np.arange(n)
    inputs[rows, where] = inputs[:, -1] = vocab_size - 1
    labels = np.full((n, length), IGNORE, dtype=np.int64)
    labels[:, -1] = inputs[rows, where + 1]
    return inputs, labels


def parity(draws: Draws, n: int, length: int, _: int, vocab_size: int = 3) -> Arrays:
    """length - 1 bits and the token 2, where the parity of the ones is asked."""
    return _at_the_end(draws, n, length, lambda bits: bits.sum(1) % 2)


def majority(draws: Draws, n: int, length: int, _: int, vocab_size: int = 3) -> Arrays:
    """length - 1 bits and the token 2, where it is asked whether more than half are ones."""
    return _at_the_end(draws, n, length, lambda bits: bits.mean(1) > 0.5)


def cumulative_parity(draws: Draws, n: int, length: int, _: int, vocab_size: int = 3) -> Arrays:
    """`length` bits, at each of which the parity of the ones so far is asked."""
    bits = draws.integers(0, 2, (n, length))
    return bits, bits.cumsum(1) % 2


def cumulative_majority(draws: Draws, n: int, length: int, _: int, vocab_size: int = 3) -> Arrays:
    """`length` bits, at each of which it is asked whether there are as many ones as zeros so far, or more."""
    bits = draws.integers(0, 2, (n, length))
    return bits, (2 * bits.cumsum(1) >= np.arange(1, length + 1)).astype(np.int64)


def _at_the_end(draws: Draws, n: int, length: int, answer) -> Arrays:
    bits = draws.integers(0, 2, (n, length - 1))
    inputs = np.concatenate([bits, np.full((n, 1), 2)], 1)
    labels = np.full((n, length), IGNORE, dtype=np.int64)
    labels[:, -1] = answer(bits)
    return inputs, labels
