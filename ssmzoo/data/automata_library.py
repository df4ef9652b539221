"""The automata of the benchmarks by name, groups from generators, and word problems.

    automaton("parity")  automaton("D4")  automaton("A5")  automaton("word_S5")  automaton("C2xC30")

Sources: Terzic et al. 2025 (arXiv 2412.19350) and its tasks/regular; Deletang et al. 2023 (arXiv 2207.02098); Merrill,
Petty & Sabharwal 2024 (arXiv 2404.08819) for the word problems.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

import numpy as np

from ssmzoo.data.automata import Automaton, AutomatonError

ALIASES = {
    "parity": "parity_check",
    "cycle": "cycle_navigation",
    "cycle_nav": "cycle_navigation",
    "modular": "modular_arithmetic",
    "mod_arith": "modular_arithmetic",
}
BENCHMARK = (
    "parity_check",
    "even_pairs",
    "cycle_navigation",
    "modular_arithmetic",
    "C2xC4",
    "D4",
    "A5",
    "C2xC30",
    "D30",
)
MAX_GROUP = 20_000  # elements that a group from generators may have


def automaton(name: str) -> Automaton:
    """The automaton of a language by name.

    parity, even_pairs, cycle, modular_arithmetic; C2x C<n> written `C2xC4`; D<n>; A5; word_<group>, where a group is
    S<n>, A<n>, Z<n> or products such as A4_x_Z5. Raises ValueError for another name.
    """
    name = ALIASES.get(name, name)
    fixed = {
        "parity_check": parity_check,
        "even_pairs": even_pairs,
        "cycle_navigation": cycle_navigation,
        "modular_arithmetic": modular_arithmetic,
        "A5": alternating_5,
    }
    if name in fixed:
        return fixed[name]()
    if match := re.fullmatch(r"C2xC(\d+)", name):
        return two_generators(name, int(match[1]), reflecting=False)
    if match := re.fullmatch(r"D(\d+)", name):
        return two_generators(name, int(match[1]), reflecting=True)
    if name.startswith("word_"):
        return word_problem(name.removeprefix("word_"))
    raise ValueError(
        f"unknown language {name!r}; choose {', '.join(BENCHMARK)}, C2xC<n>, D<n>, word_<group> "
        f"(S<n>, A<n>, Z<n>, products such as A4_x_Z5), or give data.automaton, data.regex or "
        f"data.generators"
    )


def parity_check() -> Automaton:
    return Automaton([[0, 1], [1, 0]], name="parity_check", symbols=("0", "1"))


def even_pairs() -> Automaton:
    """Class 1 when the number of unequal neighbours is odd, that is when first and last symbol differ."""
    names = ("start", "first=0,last=0", "first=0,last=1", "first=1,last=0", "first=1,last=1")
    delta = [[1, 4], [1, 2], [1, 2], [3, 4], [3, 4]]
    return Automaton(delta, [-1, 0, 1, 1, 0], name="even_pairs", symbols=("0", "1"), state_names=names)


def cycle_navigation() -> Automaton:
    delta = [[(s + step) % 5 for step in (-1, 0, 1)] for s in range(5)]
    return Automaton(delta, name="cycle_navigation", symbols=("-1", "stay", "+1"))


def modular_arithmetic(modulus: int = 5) -> Automaton:
    """Digits at even positions, + - * at odd ones; `*` binds tighter, a `-` negates only the digit after it.

    State (num, acc, prod): acc is the sum of the finished terms, prod the running signed product of the present one.
    After + or - a term has just ended; after * a factor is awaited.
    """
    m = modulus
    num = {(a, p): 1 + a * m + p for a in range(m) for p in range(m)}
    plus = {a: 1 + m * m + a for a in range(m)}
    minus = {a: 1 + m * m + m + a for a in range(m)}
    times = {(a, p): 1 + m * m + 2 * m + a * m + p for a in range(m) for p in range(m)}
    none, no_operators = [-1] * m, [-1] * 4  # the last symbol is a blank that is never drawn
    delta = [[num[0, d] for d in range(m)] + no_operators]
    delta += [none + [plus[(a + p) % m], minus[(a + p) % m], times[a, p], -1] for a, p in num]
    delta += [[num[a, d] for d in range(m)] + no_operators for a in plus]
    delta += [[num[a, -d % m] for d in range(m)] + no_operators for a in minus]
    delta += [[num[a, p * d % m] for d in range(m)] + no_operators for a, p in times]
    output = [-1] + [(a + p) % m for a, p in num] + [-1] * (len(delta) - 1 - len(num))
    names = [
        "start",
        *(f"num {a} {p}" for a, p in num),
        *(f"+ {a}" for a in plus),
        *(f"- {a}" for a in minus),
        *(f"* {a} {p}" for a, p in times),
    ]
    symbols = (*map(str, range(m)), "+", "-", "*", "_ (blank, never sampled)")
    return Automaton(delta, output, name="modular_arithmetic", symbols=symbols, state_names=tuple(names))


def two_generators(name: str, n: int, reflecting: bool) -> Automaton:
    """C2 x C_n (toggle and advance) or the dihedral group D_n (move goes backwards while the toggle is on).

    State n * toggle + position; symbol 0 toggles, symbol 1 moves. Both have 2n states.
    """
    if n < 1:
        raise ValueError(f"language {name!r}: the cycle needs at least one position")
    steps = (1, -1 if reflecting else 1)
    delta = [[n * (1 - toggle) + p, n * toggle + (p + steps[toggle]) % n] for toggle in (0, 1) for p in range(n)]
    names = [f"toggle={toggle},position={p}" for toggle in (0, 1) for p in range(n)]
    symbols = ("toggle", "move (+1 when toggle=0, -1 when toggle=1)" if reflecting else "advance")
    return Automaton(delta, name=name, symbols=symbols, state_names=tuple(names))


def alternating_5() -> Automaton:
    """A5 from a 5-cycle (symbol 0) and a double transposition (symbol 1) that rearrange a word of five letters."""
    elements = sorted(p for p in itertools.permutations(range(5)) if is_even(p))
    index = {p: i for i, p in enumerate(elements)}
    moves = ((1, 2, 3, 4, 0), (1, 0, 3, 2, 4))  # new[m] = old[move[m]]
    delta = [[index[tuple(q[m] for m in move)] for move in moves] for q in elements]
    symbols = ("cycle: new[m]=old[(m+1) mod 5]", "double swap: new=old[[1,0,3,2,4]]")
    return Automaton(delta, name="A5", symbols=symbols, state_names=tuple("".join(map(str, q)) for q in elements))


def is_even(permutation: Sequence[int]) -> bool:
    inversions = sum(a > b for i, a in enumerate(permutation) for b in permutation[i + 1 :])
    return inversions % 2 == 0


def compose(p: Sequence[int], q: Sequence[int]) -> tuple[int, ...]:
    """(p * q)(x) = p(q(x))."""
    return tuple(p[x] for x in q)


def generate_group(generators: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """All products of permutations given as image lists over 0..m-1; the identity first, then lexicographic order.

    Raises AutomatonError when a generator is not a permutation or the group has more than MAX_GROUP elements.
    """
    generators = [tuple(g) for g in generators]
    if not generators:
        raise AutomatonError("generators is empty; give at least one permutation, such as [[1, 0, 2], [1, 2, 0]]")
    size = len(generators[0])
    for i, g in enumerate(generators):
        if sorted(g) != list(range(size)):
            raise AutomatonError(
                f"generators[{i}] = {list(g)} is not a permutation of 0..{size - 1}, so it generates no group"
            )
    identity = tuple(range(size))
    seen, frontier = {identity}, [identity]
    while frontier:
        new = {compose(f, g) for f in frontier for g in generators} - seen
        seen |= new
        frontier = list(new)
        if len(seen) > MAX_GROUP:
            raise AutomatonError(f"generators span more than {MAX_GROUP} elements; choose a smaller group")
    return sorted(seen)


def group_automaton(generators: Sequence[Sequence[int]], name: str = "group", word: bool = False) -> Automaton:
    """The state is a group element, a symbol multiplies it on the right: state <- state * symbol.

    generators  permutations as lists of images; with `word` the symbols are all elements instead
    """
    elements = generate_group(generators)
    index = {p: i for i, p in enumerate(elements)}
    symbols = elements if word else [tuple(g) for g in generators]
    delta = np.array([[index[compose(p, q)] for q in symbols] for p in elements])
    label = [" ".join(map(str, p)) for p in elements]
    symbol_names = [" ".join(map(str, p)) for p in symbols]
    if len(set(symbol_names)) < len(symbol_names):
        raise AutomatonError("generators holds the same permutation twice")
    return Automaton(delta, name=name, symbols=tuple(symbol_names), state_names=tuple(label))


def group_table(group: str) -> tuple[np.ndarray, list[str]]:
    """Cayley table (element i * element j) and element names of S<n>, A<n>, Z<n> or a product joined by `_x_`."""
    parts = group.split("_x_")
    table, names = _factor(parts[0], group)
    for part in parts[1:]:
        right, right_names = _factor(part, group)
        size, n = len(right), len(table)
        i, j = np.divmod(np.arange(n * size), size)  # element (i, j) has the number i * size + j
        table = table[np.ix_(i, i)] * size + right[np.ix_(j, j)]
        names = [f"{a}:{b}" for a in names for b in right_names]
    return table, names


def _factor(part: str, group: str) -> tuple[np.ndarray, list[str]]:
    match = re.fullmatch(r"([SAZ])(\d+)", part)
    if not match or int(match[2]) < 1 or (match[1] != "Z" and int(match[2]) > 6):
        raise ValueError(f"group {group!r}: {part!r} is not S<n> or A<n> with n up to 6, or Z<n>")
    kind, n = match[1], int(match[2])
    if kind == "Z":
        numbers = np.arange(n)
        names = ["e", "a", *(f"a^{i:0{len(str(n - 1))}d}" for i in range(2, n))][:n]
        return (numbers[:, None] + numbers[None]) % n, names
    elements = [p for p in itertools.permutations(range(n)) if kind == "S" or is_even(p)]
    index = {p: i for i, p in enumerate(elements)}
    table = np.array([[index[compose(p, q)] for q in elements] for p in elements])
    return table, ["(" + ", ".join(str(x + 1) for x in p) + ")" for p in elements]


def word_problem(group: str) -> Automaton:
    """Symbols are all elements of the group, the state is their running product: delta is the Cayley table."""
    table, names = group_table(group)
    return Automaton(table, name=f"word_problem_{group}", symbols=tuple(names), state_names=tuple(names))
