"""Regular expressions as minimal automata, in bounded time: some short ones need astronomically many states."""

from __future__ import annotations

import re

import numpy as np

MOST_POSITIONS = 2_000  # symbols of an expression with its repetitions written out
MOST_STATES = 2_000  # of the deterministic automaton, before equal states are merged


def regex_table(regex: str, alphabet: str) -> tuple[np.ndarray, np.ndarray]:
    """(delta (states, symbols), accepting (states) bool) of the minimal complete automaton; state 0 is the start, the
    others in breadth-first order. Symbols are those of `alphabet` in order. Syntax: automata-lib's.

    Raises ValueError for an expression that does not parse and for one beyond the limits above, with the number.
    """
    try:
        from automata.fa.nfa import NFA
    except ImportError:
        raise ImportError("regular expressions need automata-lib: pip install automata-lib") from None
    positions = written_out(regex)
    if positions > MOST_POSITIONS:
        raise ValueError(
            f"regex {regex[:60]!r} has {positions:.3g} symbols with its repetitions written out, more than "
            f"{MOST_POSITIONS}; use smaller counts"
        )
    symbols = list(dict.fromkeys(alphabet))
    try:
        nfa = NFA.from_regex(regex, input_symbols=set(symbols))
    except Exception as error:  # automata-lib and its lexer raise types of their own
        raise ValueError(
            f"regex {regex!r} over alphabet {alphabet!r} does not parse: {type(error).__name__}: {error}"
        ) from None
    delta, accepting = _determinised(nfa, symbols, regex)
    return _breadth_first(*_minimal(delta, accepting))


def written_out(regex: str) -> float:
    """How many symbols an expression has when `{n,m}` is written out and the sides of `&` and `^` are multiplied."""
    frames = [[1.0, 0.0]]  # of every open bracket: product of the sides so far, sum of this side
    last = 0.0
    for token in re.findall(r"\{[^}]*\}|\[[^\]]*\]|.", regex, re.DOTALL):
        if token == "(":
            frames.append([1.0, 0.0])
            last = 0.0
        elif token == ")" and len(frames) > 1:
            product, side = frames.pop()
            last = product * max(side, 1.0)
            frames[-1][1] += last
        elif token in ("&", "^"):
            frames[-1] = [frames[-1][0] * max(frames[-1][1], 1.0), 0.0]
        elif len(token) > 1 and token[0] == "{":
            times = max((float(n) for n in re.findall(r"\d+", token)), default=1.0) + (token[-2] == ",")
            frames[-1][1] += last * (times - 1)
            last *= times
        elif token not in "|*+?":
            last = 1.0
            frames[-1][1] += last
    while len(frames) > 1:
        product, side = frames.pop()
        frames[-1][1] += product * side
    return frames[0][0] * max(frames[0][1], 1.0)


def _determinised(nfa, symbols: list[str], regex: str) -> tuple[np.ndarray, np.ndarray]:
    """Subset construction with sets of states as bits of an integer."""
    number = {state: i for i, state in enumerate(nfa.states)}
    closure = [0] * len(number)
    for state, i in number.items():
        seen, frontier = {state}, [state]
        while frontier:
            new = set(nfa.transitions.get(frontier.pop(), {}).get("", ())) - seen
            seen |= new
            frontier += new
        closure[i] = sum(1 << number[s] for s in seen)
    step = [[0] * len(symbols) for _ in number]
    for state, i in number.items():
        for j, symbol in enumerate(symbols):
            for after in nfa.transitions.get(state, {}).get(symbol, ()):
                step[i][j] |= closure[number[after]]
    final = sum(1 << number[s] for s in nfa.final_states)
    found, delta = {closure[number[nfa.initial_state]]: 0}, []
    subsets = list(found)
    for subset in subsets:  # grows
        row, members = [0] * len(symbols), [i for i in range(len(number)) if subset >> i & 1]
        for j in range(len(symbols)):
            for i in members:
                row[j] |= step[i][j]
            if row[j] not in found:
                found[row[j]] = len(subsets)
                subsets.append(row[j])
        delta.append([found[after] for after in row])
        if len(subsets) > MOST_STATES:
            raise ValueError(
                f"regex {regex[:60]!r} needs more than {MOST_STATES} states as a deterministic automaton; choose "
                f"another expression, or give the table by data.automaton"
            )
    return np.array(delta), np.array([bool(subset & final) for subset in subsets])


def _minimal(delta: np.ndarray, accepting: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Equal states merged (Moore 1956); the start stays state 0's class."""
    kind = accepting.astype(np.int64)
    while True:
        _, refined = np.unique(np.column_stack([kind, kind[delta]]), axis=0, return_inverse=True)
        refined = refined.reshape(-1)
        if refined.max() == kind.max() and len(np.unique(kind)) == refined.max() + 1:
            break
        kind = refined
    first = np.unique(refined, return_index=True)[1]
    order = np.r_[refined[0], np.setdiff1d(np.arange(len(first)), refined[0])]  # the start first
    renumbered = np.argsort(order)
    return renumbered[refined[delta[first]]][order], accepting[first][order]


def _breadth_first(delta: np.ndarray, accepting: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order, seen = [0], {0}
    for state in order:  # grows
        for after in delta[state].tolist():
            if after not in seen:
                seen.add(after)
                order.append(after)
    renumbered = np.empty(len(delta), dtype=np.int64)
    renumbered[order] = np.arange(len(order))
    return renumbered[delta[order]], accepting[order]
