"""Random choices of the generators: vectorised over examples, or in the order of the published code, bit for bit."""

from __future__ import annotations

import numpy as np


class Draws:
    """Vectorised choices; every method is for n examples at once.

    rng  a NumPy generator, or anything that seeds one
    """

    def __init__(self, rng: np.random.Generator | int | list[int]):
        self.rng = np.random.default_rng(rng)

    def distinct(self, low: int, high: int, n: int, m: int) -> np.ndarray:
        """(n m): m different integers of [low, high) per example, in random order."""
        return low + _smallest(self.rng.random((n, high - low), dtype=np.float32), m)

    def slots(self, n: int, slots: int, m: int, power: float) -> np.ndarray:
        """(n m): different slots, slot i (from 1) with a weight of i^(power - 1): small gaps are likely."""
        waiting = self.rng.standard_exponential((n, slots)) / np.arange(1, slots + 1) ** (power - 1.0)
        return _smallest(waiting, m)

    def integers(self, low: int, high: int, shape: tuple[int, ...]) -> np.ndarray:
        return self.rng.integers(low, high, shape)

    def other(self, low: int, high: int, avoid: np.ndarray) -> np.ndarray:
        """Integers of [low, high), none equal to its neighbour in `avoid`; the shape of `avoid`."""
        drawn = self.rng.integers(low, high - 1, avoid.shape)
        return drawn + (drawn >= avoid)

    def two_sets(self, low: int, high: int, n: int, a: int, b: int) -> tuple[np.ndarray, ...]:
        """Disjoint sets (n a) and (n b), and an index (n) into each."""
        both = self.distinct(low, high, n, a + b)
        return both[:, :a], both[:, a:], self.rng.integers(0, a, n), self.rng.integers(0, b, n)


class PublishedDraws(Draws):
    """The same choices by NumPy's legacy generator, example by example, as zoology and prefix-linear-attention draw."""

    def __init__(self, seed: int):
        self.state = np.random.RandomState(seed)

    def distinct(self, low, high, n, m):
        return np.stack([self.state.choice(np.arange(low, high), size=m, replace=False) for _ in range(n)])

    def slots(self, n, slots, m, power):
        weight = power * np.arange(1, slots + 1) ** (power - 1.0)
        weight /= weight.sum()
        return np.stack([self.state.choice(slots, size=m, replace=False, p=weight) for _ in range(n)])

    def integers(self, low, high, shape):
        return self.state.randint(low, high, shape)

    def other(self, low, high, avoid):
        allowed = np.arange(low, high)
        return np.array([[self.state.choice(allowed[allowed != v]) for v in row] for row in avoid])

    def two_sets(self, low, high, n, a, b):
        rows = []
        for _ in range(n):
            order, half = self.state.permutation(np.arange(low, high)), high // 2
            first = self.state.choice(order[:half], size=a, replace=False)
            second = self.state.choice(order[half:], size=b, replace=False)
            rows.append((first, second, self.state.randint(a), self.state.randint(b)))
        return tuple(np.stack(part) for part in zip(*rows))


def _smallest(keys: np.ndarray, m: int) -> np.ndarray:
    """(n p) -> (n m) indices of every row's m smallest, in ascending order of the key."""
    if m < keys.shape[1]:
        chosen = np.argpartition(keys, m - 1, axis=1)[:, :m]
    else:
        chosen = np.broadcast_to(np.arange(m), keys.shape)
    order = np.argsort(np.take_along_axis(keys, chosen, 1), axis=1)
    return np.take_along_axis(chosen, order, 1)
