"""Finite automata as tables: what a regular language is here, where one can come from, and how strings are drawn.

    delta[state][symbol] -> next state (-1: the symbol cannot come in this state)
    output[state]        -> class of a string that ends there (-1: no string can end there)

A language is its automaton; everything else (groups, word problems, benchmark tasks) builds one of these tables, see
`automata_library`. Running strings and drawing them is vectorised over the batch.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ssmzoo.data.automata_regex import regex_table
from ssmzoo.safe_yaml import read_yaml

LARGEST_FILE = 16 << 20  # bytes of a file with a transition table
MOST_STATES = 20_000  # in it, as many as a group from generators may have


class AutomatonError(ValueError):
    """An automaton that is not one; the message names the field and what is wrong with it."""


@dataclass(frozen=True, eq=False)
class Automaton:
    """A deterministic automaton with an output per state.

    delta    (states, symbols) int, -1 = the symbol cannot come here
    output   (states,) int class, -1 = no string ends here; default: the state itself
    initial_state   where every string starts
    symbols, state_names   names for people; default: numbers

    Raises AutomatonError naming the field; warns about states that no string reaches.
    """

    delta: np.ndarray
    output: np.ndarray | None = None
    initial_state: int = 0
    name: str = "automaton"
    symbols: tuple[str, ...] = ()
    state_names: tuple[str, ...] = ()

    def __post_init__(self):
        delta = _table(self.delta, self.name)
        n, e = delta.shape
        output = np.arange(n) if self.output is None else _vector(self.output, n, self.name)
        symbols = tuple(map(str, self.symbols)) or tuple(map(str, range(e)))
        state_names = tuple(map(str, self.state_names)) or tuple(map(str, range(n)))
        for what, names, size in (("symbols", symbols, e), ("state_names", state_names, n)):
            if len(names) != size or len(set(names)) != size:
                raise AutomatonError(
                    f"{self.name}: {what} has {len(names)} names ({len(set(names))} distinct), "
                    f"the transition table needs {size}"
                )
        if not 0 <= self.initial_state < n:
            raise AutomatonError(f"{self.name}: initial_state is {self.initial_state}; the states are 0 to {n - 1}")
        for key, value in (("delta", delta), ("output", output), ("symbols", symbols), ("state_names", state_names)):
            object.__setattr__(self, key, value)
        stuck = [s for s in self.reachable() if (delta[s] < 0).all()]
        if stuck:
            raise AutomatonError(f"{self.name}: delta leaves state {state_names[stuck[0]]!r} without any transition")
        unreachable = sorted(set(range(n)) - set(self.reachable()))
        if unreachable:
            warnings.warn(
                f"{self.name}: no string reaches {len(unreachable)} of {n} states "
                f"({', '.join(state_names[s] for s in unreachable[:5])})",
                stacklevel=3,
            )

    @property
    def num_states(self) -> int:
        return self.delta.shape[0]

    @property
    def num_symbols(self) -> int:
        return self.delta.shape[1]

    @property
    def num_classes(self) -> int:
        return int(self.output.max()) + 1

    def reachable(self) -> list[int]:
        """States that some string reaches, the initial one included."""
        seen, frontier = {self.initial_state}, [self.initial_state]
        while frontier:
            new = {int(s) for f in frontier for s in self.delta[f] if s >= 0} - seen
            seen |= new
            frontier = list(new)
        return sorted(seen)

    def encode(self, strings) -> np.ndarray:
        """Sequences of symbol names, all of one length -> ids (b l). Raises ValueError naming a foreign symbol."""
        ids = {symbol: i for i, symbol in enumerate(self.symbols)}
        for string in strings:
            foreign = next((s for s in string if s not in ids), None)
            if foreign is not None:
                raise ValueError(f"{self.name}: symbol {foreign!r} is not in the alphabet {', '.join(self.symbols)}")
        if len({len(s) for s in strings}) > 1:
            raise ValueError(f"{self.name}: the strings have different lengths; encode one length at a time")
        return np.array([[ids[s] for s in string] for string in strings], dtype=np.int64)

    def run(self, ids: np.ndarray, state: np.ndarray | None = None) -> np.ndarray:
        """Symbol ids (b l) -> state after every symbol (b l), from `state` (b,) or the initial one.

        Raises ValueError for a symbol outside the alphabet or one that cannot come where it stands.
        """
        ids = np.asarray(ids)
        if ids.size and (ids.min() < 0 or ids.max() >= self.num_symbols):
            raise ValueError(
                f"{self.name}: symbol id {int(ids.max() if ids.min() >= 0 else ids.min())} is outside the "
                f"alphabet of {self.num_symbols} symbols"
            )
        b, l = ids.shape
        states = np.empty((l, b), dtype=np.int64)
        s = np.full(b, self.initial_state) if state is None else np.asarray(state)
        for t in range(l):
            s = self.delta[s, ids[:, t]]
            if s.size and s.min() < 0:
                row = int(np.argmin(s))
                raise ValueError(
                    f"{self.name}: symbol {self.symbols[ids[row, t]]!r} cannot come at position {t + 1} of string {row}"
                )
            states[t] = s
        return states.T

    def draw(
        self,
        rng: np.random.Generator,
        batch: int,
        length: int,
        state: np.ndarray | None = None,
        weights: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """`batch` strings of `length` symbols and the states after every symbol, both (b l).

        Every symbol is uniform over those that can come in its state, or drawn with the row's `weights` (b symbols)
        among
        them; where all can always come and no weights are given, strings are uniform.
        """
        if length < 1:
            raise ValueError(f"length is {length}; a string has at least one symbol")
        s = np.full(batch, self.initial_state) if state is None else np.asarray(state)
        e, flat = self.num_symbols, self.delta.reshape(-1)
        states = np.empty((length, batch), dtype=np.int64)
        if (self.delta >= 0).all():  # no forbidden symbol anywhere: choices do not depend on the state
            if weights is None:
                ids = rng.integers(0, e, size=(length, batch), dtype=np.int64)
            else:
                uniform = rng.random((length, batch), dtype=np.float32)
                edges = (weights / weights.sum(1, keepdims=True)).cumsum(1).astype(np.float32).T.copy()  # (e b)
                ids = np.zeros((length, batch), dtype=np.int64)
                for edge in edges[:-1]:
                    ids += uniform > edge
            for t in range(length):
                s = np.take(flat, s * e + ids[t], out=states[t], mode="clip")  # mode: without a check of every index
            return ids.T, states.T
        ids = np.empty((length, batch), dtype=np.int64)
        patterns, pattern = np.unique(self.delta >= 0, axis=0, return_inverse=True)  # what can come, by state
        rows, pattern = np.arange(batch), pattern.reshape(-1)
        weights = np.ones((1, e)) if weights is None else weights
        edges = np.where(patterns[:, None], weights + 1e-9, 0).cumsum(2)  # (patterns, b or 1, e)
        edges = np.broadcast_to(edges / edges[..., -1:], (len(patterns), batch, e)).astype(np.float32)
        edges[..., -1] = 2.0  # rounding must not run past the last symbol that can come
        uniform = rng.random((length, batch), dtype=np.float32)
        last = np.array([np.flatnonzero(p)[-1] for p in patterns])
        for t in range(length):
            now = pattern[s]
            choice = (uniform[t, :, None] >= edges[now, rows]).sum(1)
            ids[t] = np.minimum(choice, last[now])
            s = flat.take(s * e + ids[t])
            states[t] = s
        return ids.T, states.T

    def count_strings(self, length: int) -> np.ndarray:
        """How many strings of 0, 1, ..., length symbols there are (float; with forbidden symbols fewer than e^l)."""
        at = np.zeros(self.num_states)
        at[self.initial_state] = 1.0
        counts = [1.0]
        rows, columns = np.nonzero(self.delta >= 0)
        targets = self.delta[rows, columns]
        for _ in range(length):
            after = np.zeros_like(at)
            np.add.at(after, targets, at[rows])
            at = after
            counts.append(at.sum())
        return np.array(counts)

    def closest_length(self, length: int) -> int:
        """The largest length <= `length` at which a string can end. Raises ValueError when there is none."""
        if length < 1:
            raise ValueError(f"length is {length}; a string has at least one symbol")
        can_end = self._can_end(length)
        for shorter in range(length, 0, -1):
            if can_end[shorter]:
                return shorter
        raise ValueError(f"{self.name}: no string of at most {length} symbols can end (output is -1 in every state)")

    def _can_end(self, length: int) -> list[bool]:
        """Whether some string of length t = 0 .. length ends in a state with an output."""
        if (self.output >= 0).all():
            return [True] * (length + 1)
        reached = np.zeros(self.num_states, dtype=bool)
        reached[self.initial_state] = True
        result, cycle = [bool(self.output[self.initial_state] >= 0)], {}
        for t in range(1, length + 1):
            after = np.zeros_like(reached)
            next_states = self.delta[reached]
            after[next_states[next_states >= 0]] = True
            reached = after
            key = reached.tobytes()
            if key in cycle:  # the set of reachable states repeats from here on
                period = t - cycle[key]
                while len(result) <= length:
                    result.append(result[-period])
                return result
            cycle[key] = t
            result.append(bool((self.output[reached] >= 0).any()))
        return result

    def to_dict(self) -> dict:
        return {
            "name": self.name,
            "symbols": list(self.symbols),
            "state_names": list(self.state_names),
            "initial_state": int(self.initial_state),
            "delta": self.delta.tolist(),
            "output": self.output.tolist(),
        }

    @classmethod
    def from_dict(cls, table: dict, name: str = "automaton") -> Automaton:
        """From `{"delta": [[...]], "output": [...], "initial_state": 0, "symbols": [...], "state_names": [...]}`.

        States may be numbers or names from `state_names`; `accepting: [states]` may stand for a 0/1 output.
        """
        if not isinstance(table, dict) or "delta" not in table:
            raise AutomatonError(
                f"{name}: an automaton is a mapping with the key 'delta' (and 'output', "
                f"'initial_state', "
                f"'symbols', 'state_names'); got "
                f"{sorted(table) if isinstance(table, dict) else table!r}"
            )
        known = {
            "delta",
            "output",
            "accepting",
            "initial_state",
            "symbols",
            "state_names",
            "name",
            "task",
            "num_symbols",
            "num_states",
            "num_classes",
            "convention",
            "element_names",
            "note",
            "source",
        }
        if set(table) - known:
            raise AutomatonError(
                f"{name}: unknown key {sorted(set(table) - known)[0]!r}; known: {', '.join(sorted(known))}"
            )
        names = [str(s) for s in table.get("state_names") or table.get("element_names") or []]
        number = {s: i for i, s in enumerate(names)}

        def state(value, where):
            if isinstance(value, str):
                if value not in number:
                    raise AutomatonError(f"{name}: {where} names the state {value!r}, which is not in state_names")
                return number[value]
            return value

        delta = [
            [state(v, f"delta[{i}]") for v in row] if isinstance(row, (list, tuple)) else row
            for i, row in enumerate(table["delta"])
        ]
        output = table.get("output")
        if "accepting" in table:
            accepting = {state(v, "accepting") for v in table["accepting"]}
            output = [int(s in accepting) for s in range(len(delta))]
        return cls(
            delta,
            output,
            state(table.get("initial_state", 0), "initial_state"),
            str(table.get("name") or table.get("task") or name),
            tuple(table.get("symbols") or ()),
            tuple(names),
        )

    @classmethod
    def from_file(cls, path: str | Path) -> Automaton:
        """From a YAML or JSON file with the keys of `from_dict`."""
        path = Path(path).expanduser()
        if not path.is_file():
            raise AutomatonError(f"no automaton file at {path}")
        try:
            table = read_yaml(path, largest=LARGEST_FILE)
        except (ValueError, OSError) as error:
            raise AutomatonError(f"{path} cannot be read as YAML or JSON: {error}") from None
        states = table.get("delta") if isinstance(table, dict) else None
        if isinstance(states, list) and len(states) > MOST_STATES:
            raise AutomatonError(f"{path} has {len(states):,} states, more than {MOST_STATES:,}: refused")
        return cls.from_dict(table, name=path.stem)

    @classmethod
    def from_regex(cls, regex: str, alphabet: str) -> Automaton:
        """The minimal automaton of a regular expression (class 1: accepted), in the syntax of automata-lib.

        regex     `*` `+` `?` `|` `&` `()` `{n,m}`, e.g. "(ab)*"
        alphabet  the symbols as one string, e.g. "ab"

        Raises AutomatonError for what does not parse or needs too many states (see `automata_regex`).
        """
        if not alphabet:
            raise AutomatonError("alphabet is empty; give the symbols as one string, such as 'ab'")
        try:
            delta, accepting = regex_table(regex, alphabet)
        except ValueError as error:
            raise AutomatonError(str(error)) from None
        return cls(delta, accepting.astype(int), 0, f"regex {regex}", tuple(dict.fromkeys(alphabet)))


def _table(delta, name: str) -> np.ndarray:
    rows = delta.tolist() if isinstance(delta, np.ndarray) else delta
    if not isinstance(rows, (list, tuple)) or not rows or not all(isinstance(r, (list, tuple)) for r in rows):
        raise AutomatonError(f"{name}: delta must be a list with one row per state and one entry per symbol")
    width = max(len(r) for r in rows)
    for i, row in enumerate(rows):
        if len(row) != width or any(v is None for v in row):
            missing = width - len(row) + sum(v is None for v in row)
            raise AutomatonError(
                f"{name}: delta[{i}] lacks {missing} of {width} transitions; write one next state per "
                f"symbol, or -1 for a symbol that cannot come there"
            )
        for j, value in enumerate(row):
            if not isinstance(value, (int, np.integer)) or not -1 <= value < len(rows):
                raise AutomatonError(
                    f"{name}: delta[{i}][{j}] is {value!r}; the states are 0 to {len(rows) - 1} (-1: cannot come)"
                )
    if width == 0:
        raise AutomatonError(f"{name}: delta has no symbols")
    return np.array(rows, dtype=np.int64)


def _vector(output, n: int, name: str) -> np.ndarray:
    values = np.asarray(output)
    if values.shape != (n,) or values.dtype.kind not in "iu":
        raise AutomatonError(
            f"{name}: output has shape {values.shape} of {values.dtype}, expected one class per state ({n})"
        )
    if values.min() < -1 or values.max() < 0:
        raise AutomatonError(
            f"{name}: output must hold classes from 0 (and -1 where no string can end), got {values.tolist()}"
        )
    return values.astype(np.int64)
