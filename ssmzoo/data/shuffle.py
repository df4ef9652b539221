"""A random order of n things that takes no memory: a keyed permutation instead of a shuffled list.

A list of the 10^8 windows of a 100 GB corpus would cost 800 MB per process and per epoch; here the index of one item is
computed when it is asked for.
"""

from __future__ import annotations

_MASK = 0xFFFFFFFFFFFFFFFF
_ROUNDS = 8


class Permutation:
    """A pseudo-random bijection of range(n) onto itself, a pure function of (n, seed).

    A balanced Feistel network on the smallest even number of bits that holds n, walked until it falls below n again
    (cycle walking: fewer than four steps on average). `Permutation(n, seed)[i]` costs microseconds and O(1) memory.
    Source: Black & Rogaway 2002, "Ciphers with arbitrary finite domains", method 2 and 3.
    """

    def __init__(self, n: int, seed: int):
        if n < 1:
            raise ValueError(f"n is {n}; a permutation needs at least one element")
        self.n = n
        self.half = max(1, ((n - 1).bit_length() + 1) // 2)  # bits per half
        self.keys = [mix(seed * _ROUNDS + i) for i in range(_ROUNDS)]

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> int:
        if not 0 <= i < self.n:
            raise IndexError(f"index {i} is outside range({self.n})")
        i = self._encrypt(i)
        while i >= self.n:
            i = self._encrypt(i)
        return i

    def _encrypt(self, x: int) -> int:
        low = (1 << self.half) - 1
        left, right = x >> self.half, x & low
        for key in self.keys:
            left, right = right, left ^ (mix(right ^ key) & low)
        return left << self.half | right


def mix(x: int) -> int:
    """One step of splitmix64: 64 well-mixed bits from an integer."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)
