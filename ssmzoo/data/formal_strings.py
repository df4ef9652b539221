"""Strings of an automaton as batches: reproducible from a seed, drawn in blocks, never a test string among them.

A string is a test string when a hash of it falls below `held_out`, provided that its length has so many strings that
training cannot cover them anyway. Training leaves the answers of test strings out, prefixes included; strings longer
than the training length are all test strings.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ssmzoo.data.automata import Automaton

IGNORE = -100  # label of a position without an answer
SMALL_SPACE = 32_768  # lengths with fewer strings than this are covered by training and tested on all strings
BLOCK = 4096  # strings drawn together, or a batch when that is more


class Strings(NamedTuple):
    """ids (b l), labels (b l) with -100 where there is no answer, hashes (b l) uint64 of every prefix."""

    ids: np.ndarray
    labels: np.ndarray
    hashes: np.ndarray


def prefix_hashes(ids: np.ndarray) -> np.ndarray:
    """A 64-bit hash of every prefix (b l): a polynomial of the symbols, whose high bits are spread by one product."""
    columns = np.add(ids.T, 1, dtype=np.uint64, casting="unsafe")  # (l b)
    total, product = np.uint64(0x632BE59BD9B4E019), np.empty(columns.shape[1], dtype=np.uint64)
    with np.errstate(over="ignore"):  # modulo 2^64
        for column in columns:
            np.multiply(total, np.uint64(0xD1342543DE82EF95), out=product)
            column += product
            total = column
    columns *= np.uint64(0x9E3779B97F4A7C15)
    return columns.T


class HeldOut:
    """Which strings are for testing only. `first`: shortest length at which strings are held out."""

    def __init__(self, automaton: Automaton, share: float, max_length: int):
        self.share, self.max_length = share, max_length
        large = np.flatnonzero(automaton.count_strings(max_length) >= SMALL_SPACE)
        self.first = int(large[0]) if len(large) and share > 0 else max_length + 1
        self.threshold = np.uint64(int(share * float(2**64 - 1)))

    def is_test(self, hashes: np.ndarray, start: int = 0) -> np.ndarray:
        """(b l) hashes of the prefixes that end at positions `start` and later -> bool: must not be trained on."""
        result = hashes < self.threshold
        result[:, : max(0, self.first - 1 - start)] = False
        return result

    def may_test(self, hashes: np.ndarray) -> np.ndarray:
        """Prefixes that are fair to test on: held out, too long for training, or of a length that all strings share."""
        result = hashes < self.threshold
        result[:, : self.first - 1] = True
        result[:, self.max_length :] = True
        return result


class TrainingStrings:
    """Batch number -> batch, as a function of the seed alone.

    curriculum  "fixed": every string has max_length; "uniform": one length per batch, uniform over min_length ..
                max_length; "increasing": the length grows from min_length to max_length over curriculum_steps batches
    supervise   "every": the answer of every prefix is a label; "last": only the answer of the whole string
    query       append a token of its own, id = number of symbols, where the answer is read (supervise "last")
    skewed      share of strings whose symbols have random frequencies (flat Dirichlet) in place of equal ones, so that
                states far from the start are met within the training length
    """

    def __init__(
        self,
        automaton: Automaton,
        held_out: HeldOut,
        batch_size: int,
        min_length: int,
        max_length: int,
        curriculum: str,
        curriculum_steps: int,
        supervise: str,
        query: bool,
        skewed: float,
        seed: int,
    ):
        self.automaton, self.held_out, self.batch_size = automaton, held_out, batch_size
        self.min_length, self.max_length = min_length, max_length
        self.curriculum, self.curriculum_steps = curriculum, curriculum_steps
        self.supervise, self.query, self.skewed, self.seed = supervise, query, skewed, seed
        self.batches = max(1, BLOCK // batch_size)  # drawn together
        self.answers = answer_table(automaton)
        self.lengths = {
            wanted: automaton.closest_length(wanted) if supervise == "last" else wanted
            for wanted in range(min_length, max_length + 1)
        }
        self._block: tuple[int, np.ndarray, np.ndarray, np.ndarray | None, list[int]] | None = None

    def length(self, index: int, uniform: float) -> int:
        low, high = self.min_length, self.max_length
        if self.curriculum == "uniform":
            high = low + int(uniform * (high - low + 1))
        elif self.curriculum == "increasing":
            high = low + (high - low) * min(index, self.curriculum_steps) // self.curriculum_steps
        return self.lengths[high]

    def __call__(self, index: int) -> dict[str, Tensor]:
        block, within = divmod(index, self.batches)
        if self._block is None or self._block[0] != block:
            self._block = (block, *self._draw(block))
        _, ids, states, hashes, lengths = self._block
        rows, length = slice(within * self.batch_size, (within + 1) * self.batch_size), lengths[within]
        first = length - 1 if self.supervise == "last" else self.min_length - 1  # position of the first answer
        labels = np.full((self.batch_size, length), IGNORE)
        labels[:, first:] = self.answers.take(states[rows, first:length].T).T
        if hashes is not None:
            labels[:, first:][self.held_out.is_test(hashes[rows, first:length], first)] = IGNORE
        ids = ids[rows, :length].copy(order="F").copy(order="C")  # (b l); at once it would miss the cache at every step
        if self.query:
            ids, labels = append_query(ids, labels, self.automaton.num_symbols)
        return {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}

    def _draw(self, block: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, list[int]]:
        """ids, states and, where strings are held out, hashes (batches * batch_size, max_length); a length per
        batch."""
        rng = np.random.default_rng([self.seed, block])
        lengths = [self.length(block * self.batches + i, u) for i, u in enumerate(rng.random(self.batches))]
        rows, e, longest = self.batches * self.batch_size, self.automaton.num_symbols, max(lengths)
        weights = symbol_weights(rng, rows, e, self.skewed) if self.skewed else None
        ids, states = self.automaton.draw(rng, rows, longest, weights=weights)
        return ids, states, prefix_hashes(ids) if self.held_out.first <= longest else None, lengths


def symbol_weights(rng: np.random.Generator, rows: int, symbols: int, skewed: float) -> np.ndarray:
    """How often each symbol comes in each string, up to a factor: (rows symbols)"""
    return np.where(rng.random((rows, 1)) < skewed, rng.exponential(size=(rows, symbols)), 1.0)


def answer_table(automaton: Automaton) -> np.ndarray:
    """Class label of every state, -100 where no string can end."""
    return np.where(automaton.output < 0, IGNORE, automaton.output)


def answers(automaton: Automaton, states: np.ndarray) -> np.ndarray:
    """States -> class labels, -100 where no string can end."""
    return answer_table(automaton).take(states.T).T  # in the memory order of `states`


def append_query(ids: np.ndarray, labels: np.ndarray, token: int) -> tuple[np.ndarray, np.ndarray]:
    """The query token stands after the string and takes over the label of its last symbol."""
    rows = len(ids)
    ids = np.concatenate([ids, np.full((rows, 1), token)], axis=1)
    return ids, np.concatenate([np.full_like(labels, IGNORE), labels[:, -1:]], axis=1)


class BatchStream:
    """A loader without end whose batch is a function of its number; resumes exactly.

    make  number -> batch;  per_epoch  batches that one `iter()` yields;  rank, world_size  which of the numbers are
          ours
    """

    def __init__(
        self, make: Callable[[int], dict[str, Tensor]], per_epoch: int = 1000, rank: int = 0, world_size: int = 1
    ):
        self.make, self.per_epoch, self.rank, self.world_size, self.position = make, per_epoch, rank, world_size, 0
        self.waited = 0.0  # seconds that making batches took, while whoever iterates waited

    def __len__(self) -> int:
        return self.per_epoch

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        end = (self.position // self.per_epoch + 1) * self.per_epoch
        while self.position < end:
            self.position += 1
            asked = time.perf_counter()
            batch = self.make((self.position - 1) * self.world_size + self.rank)
            self.waited += time.perf_counter() - asked
            yield batch

    def peek(self, count: int) -> list[dict[str, Tensor]]:
        """The next `count` batches before the next `iter()`, which will be yielded all the same."""
        end = -(-self.position // self.per_epoch) * self.per_epoch
        wanted = range(self.position, min(self.position + count, end))
        return [self.make(i * self.world_size + self.rank) for i in wanted]

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class FixedBatches:
    """A loader over batches that are there already."""

    def __init__(self, batches: list[dict[str, Tensor]]):
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter(self.batches)


def test_strings(automaton: Automaton, held_out: HeldOut, rng: np.random.Generator, count: int, length: int) -> Strings:
    """`count` strings of exactly `length` symbols, none of which training uses (where the space allows)."""
    if held_out.first <= length <= held_out.max_length:
        parts, found = [], 0
        while found < count:
            ids, _ = automaton.draw(rng, int(2 * count / held_out.share) + 16, length)
            ids = ids[prefix_hashes(ids)[:, -1] < held_out.threshold]
            parts.append(ids)
            found += len(ids)
        ids = np.concatenate(parts)[:count]
    else:
        ids, _ = automaton.draw(rng, count, length)
    return Strings(ids, answers(automaton, automaton.run(ids)), prefix_hashes(ids))


def test_prefixes(
    automaton: Automaton, held_out: HeldOut, rng: np.random.Generator, count: int, length: int
) -> list[Strings]:
    """`count` strings of `length`, read at every prefix that is fair to test, and enough short ones to make up for the
    prefixes that training uses."""
    sets = [(count, length)]
    if held_out.first <= held_out.max_length:
        sets.append((int(count / held_out.share), min(length, held_out.max_length)))
    result = []
    for rows, l in sets:
        ids, states = automaton.draw(rng, rows, l)
        hashes, labels = prefix_hashes(ids), answers(automaton, states)
        labels[~held_out.may_test(hashes)] = IGNORE
        if rows != count:
            labels[:, : held_out.first - 1] = IGNORE  # the first set has enough of these
        result.append(Strings(ids, labels, hashes))
    return result
