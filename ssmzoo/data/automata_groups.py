"""What an automaton's transitions generate: a group or not, commutative or not, solvable or not.

These are the properties that decide which models can emulate it: diagonal transitions commute, solvable groups are
within reach of several diagonal layers, non-solvable ones (A5) need dense transitions or depth that grows with length.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ssmzoo.data.automata import Automaton, AutomatonError
from ssmzoo.data.automata_library import MAX_GROUP, compose


class Structure(NamedTuple):
    """size  elements of the transition monoid (or a lower bound when `complete` is False)."""

    size: int
    complete: bool
    is_group: bool
    commutative: bool
    solvable: bool | None  # None: not a group, or too large to tell


def permutation_matrices(automaton: Automaton) -> np.ndarray:
    """(symbols, states, states): P[symbol][:, s] is one at the state that `symbol` leads to from s.

    Raises AutomatonError when a symbol is not a permutation of the states: then there is no group.
    """
    n, e = automaton.delta.shape
    P = np.zeros((e, n, n))
    for symbol in range(e):
        image = automaton.delta[:, symbol]
        if sorted(image.tolist()) != list(range(n)):
            raise AutomatonError(
                f"{automaton.name}: symbol {automaton.symbols[symbol]!r} is not a permutation of the "
                f"states, so the automaton is not a group"
            )
        P[symbol, image, np.arange(n)] = 1
    return P


def is_group(automaton: Automaton) -> bool:
    n = automaton.num_states
    return all(len(set(column.tolist())) == n and column.min() >= 0 for column in automaton.delta.T)


def structure(automaton: Automaton, limit: int = MAX_GROUP) -> Structure:
    """Size and kind of the monoid of all state maps that strings induce; forbidden moves go to a state of their own."""
    n = automaton.num_states
    trap = bool((automaton.delta < 0).any())
    generators = [tuple(np.where(c < 0, n, c).tolist()) + ((n,) if trap else ()) for c in automaton.delta.T]
    generators = [g for g in dict.fromkeys(generators) if not trap or len(set(g)) > 1]
    commutative = all(compose(a, b) == compose(b, a) for a in generators for b in generators)
    elements = closure(generators, limit)
    complete = elements is not None
    group = is_group(automaton)
    solvable = _solvable(generators, elements, limit) if group and complete else None
    return Structure(len(elements) if complete else limit, complete, group, commutative, solvable)


def closure(generators: list[tuple[int, ...]], limit: int) -> set[tuple[int, ...]] | None:
    """All products of the maps, the identity included; None when there are more than `limit`."""
    identity = tuple(range(len(generators[0])))
    seen, frontier = {identity}, [identity]
    while frontier:
        new = {compose(g, f) for f in frontier for g in generators} - seen
        seen |= new
        frontier = list(new)
        if len(seen) > limit:
            return None
    return seen


def _solvable(generators, elements: set, limit: int) -> bool | None:
    """Whether the derived series reaches the identity: each step generates by commutators and their conjugates."""
    current, size = list(generators), len(elements)
    while size > 1:
        commutators = {compose(compose(a, b), compose(inverse(a), inverse(b))) for a in current for b in current}
        normal = {compose(compose(x, c), inverse(x)) for c in commutators for x in _short_products(current)}
        derived = _normal_closure(sorted(commutators | normal), current, limit)
        if derived is None:
            return None
        if len(derived) == size:
            return False
        current, size = sorted(derived), len(derived)
        current = current if size <= 400 else current[:400]
    return True


def _short_products(generators) -> list:
    return list(generators)[:20]


def _normal_closure(seeds, by, limit):
    """The smallest subgroup that contains `seeds` and is closed under conjugation with `by`."""
    while True:
        group = closure(list(seeds), limit)
        if group is None:
            return None
        outside = {compose(compose(x, s), inverse(x)) for s in seeds for x in by} - group
        if not outside:
            return group
        seeds = sorted({*seeds, *outside})


def inverse(p: tuple[int, ...]) -> tuple[int, ...]:
    result = [0] * len(p)
    for i, image in enumerate(p):
        result[image] = i
    return tuple(result)
