"""Multi-query associative recall and its variants: keys and values first, then some of the keys again.

Sources: Arora et al. 2023 (arXiv 2312.04927), HazyResearch/zoology `data/multiquery_ar.py`, `forgetting_mqar.py`,
`compositional_mqar.py`; disjoint sets: Arora et al. 2024 (arXiv 2407.05483), prefix-linear-attention `non_autoreg.py`.
Every function returns (inputs (n length), labels (n length)), int64; labels are -100 but at the queries.
"""

from __future__ import annotations

import numpy as np

from ssmzoo.data.recall.draws import Draws

IGNORE = -100
UPDATES = 2  # keys that get a second value, if nothing else is said
Arrays = tuple[np.ndarray, np.ndarray]


def mqar(
    draws: Draws, n: int, length: int, pairs: int, vocab_size: int, power: float = 0.01, random_fillers: bool = False
) -> Arrays:
    """`pairs` keys with their values, k v k v ..., then every key once more at a random even distance; label: value.

        vocab_size 12, pairs 2    inputs  2 8 4 7 0 0 4 0 0 0 0 0 2 0 0 0
                                  labels  . . . . . . 7 . . . . . 8 . . .

    Keys are 1 .. v/2 - 1, values v/2 .. v - 1. power: the smaller, the sooner a key is asked for. random_fillers: any
    token instead of the zeros in between.
    """
    keys = draws.distinct(1, vocab_size // 2, n, pairs)
    values = draws.distinct(vocab_size // 2, vocab_size, n, pairs)
    context = np.stack([keys, values], -1).reshape(n, -1)
    return _ask(draws, context, keys[..., None], values, length, power, random_fillers and vocab_size)


def forgetting_mqar(
    draws: Draws,
    n: int,
    length: int,
    pairs: int,
    vocab_size: int,
    updates: int = UPDATES,
    power: float = 0.01,
    random_fillers: bool = False,
    avoid_replaced: bool = True,
) -> Arrays:
    """`mqar` in which `updates` of the keys get another value before the queries; label: the last value.

    avoid_replaced  a new value differs from the one it replaces; False, as published: from that of key 0, 1, ...
    """
    keys = draws.distinct(1, vocab_size // 2, n, pairs)
    values = draws.distinct(vocab_size // 2, vocab_size, n, pairs)
    if avoid_replaced:
        which = draws.distinct(0, pairs, n, updates)
        new = draws.other(vocab_size // 2, vocab_size, np.take_along_axis(values, which, 1))
    else:
        new = draws.other(vocab_size // 2, vocab_size, values[:, :updates])
        which = draws.distinct(0, pairs, n, updates)
    again = np.stack([np.take_along_axis(keys, which, 1), new], -1).reshape(n, -1)
    context = np.concatenate([np.stack([keys, values], -1).reshape(n, -1), again], 1)
    last = values.copy()
    np.put_along_axis(last, which, new, 1)
    return _ask(draws, context, keys[..., None], last, length, power, random_fillers and vocab_size)


def compositional_mqar(
    draws: Draws, n: int, length: int, pairs: int, vocab_size: int, power: float = 0.01, random_fillers: bool = False
) -> Arrays:
    """`mqar` whose keys are two tokens, all combinations of sqrt(pairs) first and second ones; a value belongs to both.

    First tokens are 1 .. v/3 - 1, second ones v/3 .. 2v/3 - 1, values the rest; the label stands at the second.
    """
    side = round(pairs**0.5)
    first = draws.distinct(1, vocab_size // 3, n, side)
    second = draws.distinct(vocab_size // 3, 2 * vocab_size // 3, n, side)
    cell = draws.distinct(0, pairs, n, pairs)
    values = draws.distinct(2 * vocab_size // 3, vocab_size, n, pairs)
    keys = np.stack(
        [np.take_along_axis(first, cell // side, 1), np.take_along_axis(second, cell % side, 1)], -1
    )  # (n pairs 2)
    context = np.concatenate([keys, values[..., None]], -1).reshape(n, -1)
    return _ask(draws, context, keys, values, length, power, random_fillers and vocab_size)


def _ask(draws, context: np.ndarray, keys: np.ndarray, values: np.ndarray, length: int, power: float, fill) -> Arrays:
    """context (n c), keys (n m t) tokens, values (n m): the context and behind it every key at a multiple of t + 1."""
    n, start = context.shape
    pairs, tokens = keys.shape[1:]
    slots = draws.slots(n, (length - start) // (tokens + 1), pairs, power)
    inputs = np.zeros((n, length), dtype=np.int64)
    labels = np.full((n, length), IGNORE, dtype=np.int64)
    inputs[:, :start] = context
    at = start + (tokens + 1) * slots
    for t in range(tokens):
        np.put_along_axis(inputs, at + t, keys[..., t], 1)
    np.put_along_axis(labels, at + tokens - 1, values, 1)
    if fill:
        inputs = np.where(inputs == 0, draws.integers(0, fill, inputs.shape), inputs)
    return inputs, labels


def disjoint_sets(draws: Draws, n: int, short: int, long: int, vocab_size: int) -> Arrays:
    """[1] short set [2] long set [3]: one token is in both; it is the label at the end. Tokens are 4 .. v - 1."""
    a, b, i, j = draws.two_sets(4, vocab_size, n, short, long)
    rows, b = np.arange(n), b.copy()
    b[rows, j] = a[rows, i]
    mark = np.ones((n, 1), dtype=np.int64)
    inputs = np.concatenate([mark, a, 2 * mark, b, 3 * mark], 1)
    labels = np.full_like(inputs, IGNORE)
    labels[:, -1] = a[rows, i]
    return inputs, labels
