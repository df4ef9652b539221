"""Regular languages as data: an automaton, batches of its strings without end, and test sets for every length.

Protocol A of the benchmarks (one answer per string, lengths up to 40 in training, 1 to 500 in the test) and its variant
with an answer at every prefix. Protocols B and C are in `formal_protocols`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from ssmzoo.data.automata import Automaton, AutomatonError
from ssmzoo.data.automata_groups import permutation_matrices
from ssmzoo.data.automata_library import automaton, group_automaton
from ssmzoo.data.formal_strings import (
    BatchStream,
    FixedBatches,
    HeldOut,
    Strings,
    TrainingStrings,
    answers,
    append_query,
    symbol_weights,
    test_prefixes,
    test_strings,
)

CURRICULA = ("increasing", "uniform", "fixed")


def choose_automaton(
    language: str | None,
    path: str | None = None,
    regex: str | None = None,
    alphabet: str | None = None,
    generators: list | None = None,
) -> Automaton:
    """The automaton of a name, a YAML or JSON file, a regular expression, or permutations; errors name the field."""
    sources = {"automaton": path, "regex": regex, "generators": generators}
    given = [name for name, value in sources.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"data.{given[0]} and data.{given[1]} are both given; choose one")
    if alphabet is not None and regex is None:
        raise ValueError("data.alphabet is given without data.regex")
    if path is not None:
        return Automaton.from_file(path)
    if regex is not None:
        if alphabet is None:
            raise ValueError("data.regex needs data.alphabet, the symbols as one string, such as 'ab'")
        return Automaton.from_regex(regex, alphabet)
    if generators is not None:
        return group_automaton(generators)
    return automaton(str(language))


class FormalData(LightningDataModule):
    """Strings of a regular language.

    language     a name known to `automata_library.automaton` (parity, cycle, A5, word_S5, ...), unless one of
    automaton    YAML or JSON file with the user's transition table,
    regex        regular expression over `alphabet` (classes: 0 rejected, 1 accepted),
    generators   permutations as lists of images (the state is the product) is given
    group        insist that every symbol permutes the states
    batch_size, min_length, max_length, curriculum, curriculum_steps, supervise, query_token, skewed   see
                                                                                                       TrainingStrings
    held_out     share of the strings kept for testing at lengths that training also sees
    val_samples  strings of `test_length` that validation reads at every prefix
    test_length  longest length of the per-length test;  test_samples  strings per length
    test_strings "independent": fresh strings for every length (published protocol); "prefixes": every prefix of the
    same
                 strings, far cheaper; None: prefixes, or independent with a query token
    seed         of everything drawn

    A batch is {"input_ids" (b l), "labels" (b l)}: labels are -100 where no answer is asked for.
    sizes: num_symbols (query token included), num_classes, num_states, and vocab_size = max(num_symbols, num_classes)
    for
    language models, whose first num_classes logits are read.
    """

    default_task = "formal"

    def __init__(
        self,
        language: str | None = "cycle_navigation",
        automaton: str | None = None,
        regex: str | None = None,
        alphabet: str | None = None,
        generators: list | None = None,
        group: bool = False,
        batch_size: int = 128,
        min_length: int = 1,
        max_length: int = 40,
        curriculum: str = "increasing",
        curriculum_steps: int = 500,
        supervise: str = "every",
        query_token: bool = False,
        skewed: float = 0.0,
        held_out: float = 0.125,
        val_samples: int = 64,
        test_length: int = 500,
        test_samples: int = 512,
        test_strings: str | None = None,
        seed: int = 0,
    ):
        super().__init__()
        for name, value in (
            ("batch_size", batch_size),
            ("min_length", min_length),
            ("val_samples", val_samples),
            ("curriculum_steps", curriculum_steps),
            ("test_length", test_length),
            ("test_samples", test_samples),
        ):
            if value < 1:
                raise ValueError(f"data.{name} is {value}; it must be at least 1")
        if max_length < min_length:
            raise ValueError(f"data.max_length is {max_length}, below data.min_length = {min_length}")
        for name, value, choices in (
            ("curriculum", curriculum, CURRICULA),
            ("supervise", supervise, ("every", "last")),
            ("test_strings", test_strings, ("independent", "prefixes", None)),
        ):
            if value not in choices:
                raise ValueError(f"data.{name} is {value!r}; choose one of {', '.join(map(str, choices))}")
        for name, value in (("held_out", held_out), ("skewed", skewed)):
            if not 0 <= value <= (1 if name == "skewed" else 0.5):
                raise ValueError(f"data.{name} is {value}; give a share between 0 and {1 if name == 'skewed' else 0.5}")
        if query_token and (supervise == "every" or test_strings == "prefixes"):
            raise ValueError(
                "data.query_token=true reads one answer per string, after it: it needs "
                "data.supervise=last and "
                "data.test_strings=independent"
            )
        self.language = choose_automaton(language, automaton, regex, alphabet, generators)
        if group:
            permutation_matrices(self.language)
        self.language.closest_length(min_length)  # a language that cannot end so early is refused now
        if len(set(self.language.output[self.language.reachable()].tolist()) - {-1}) < 2:
            raise AutomatonError(f"{self.language.name}: output has a single class; there is nothing to learn")
        self.batch_size, self.max_length, self.query_token, self.seed = batch_size, max_length, query_token, seed
        self.val_samples, self.test_length, self.test_samples = val_samples, test_length, test_samples
        self.test_mode = test_strings or ("independent" if query_token else "prefixes")
        self.held_out = HeldOut(self.language, held_out, max_length)
        self.training = TrainingStrings(
            self.language,
            self.held_out,
            batch_size,
            min_length,
            max_length,
            curriculum,
            curriculum_steps,
            supervise,
            query_token,
            skewed,
            seed,
        )

    @property
    def sizes(self) -> dict[str, int]:
        symbols, classes = self.language.num_symbols + self.query_token, self.language.num_classes
        return {
            "num_symbols": symbols,
            "num_classes": classes,
            "vocab_size": max(symbols, classes),
            "num_states": self.language.num_states,
        }

    def describe(self) -> dict[str, str | int]:
        table = repr(self.language.to_dict()).encode()
        return {
            "language": self.language.name,
            "states": self.language.num_states,
            "automaton_sha256": hashlib.sha256(table).hexdigest()[:16],
            "max_length": self.max_length,
            "seed": self.seed,
        }

    def train_dataloader(self) -> BatchStream:
        attached = self.trainer is not None
        return BatchStream(
            self.training,
            rank=self.trainer.global_rank if attached else 0,
            world_size=self.trainer.world_size if attached else 1,
        )

    def val_dataloader(self) -> FixedBatches:
        """Strings up to test_length, disjoint from the test's; with a query token at eight lengths."""
        rng = np.random.default_rng([self.seed, 1 << 40])
        if self.query_token:
            lengths = sorted({self.language.closest_length(max(1, self.test_length * i // 8)) for i in range(1, 9)})
            drawn = [
                self._with_query(test_strings(self.language, self.held_out, rng, self.val_samples, length))
                for length in lengths
            ]
        else:
            drawn = test_prefixes(self.language, self.held_out, rng, self.val_samples, self.test_length)[:1]
        return FixedBatches(
            [
                {"input_ids": torch.from_numpy(s.ids.copy()), "labels": torch.from_numpy(s.labels.copy())}
                for whole in drawn
                for s in _slices(whole, 32)
            ]
        )

    def test_sets(self) -> Iterator[Strings]:
        """The strings of the per-length test, in the form `test_mode` says; labels are -100 except where read."""
        rng = np.random.default_rng([self.seed, 1 << 41])
        if self.test_mode == "prefixes":
            for whole in test_prefixes(self.language, self.held_out, rng, self.test_samples, self.test_length):
                yield from _slices(whole, 64)
            return
        for length in range(1, self.test_length + 1):
            actual = self.language.closest_length(length)
            strings = test_strings(self.language, self.held_out, rng, self.test_samples, actual)
            labels = np.full_like(strings.labels, -100)
            labels[:, -1] = strings.labels[:, -1]
            strings = strings._replace(labels=labels)
            yield self._with_query(strings) if self.query_token else strings

    def _with_query(self, strings: Strings) -> Strings:
        ids, labels = append_query(strings.ids, strings.labels, self.language.num_symbols)
        return Strings(ids, labels, np.concatenate([strings.hashes, strings.hashes[:, -1:]], axis=1))

    def longest(self, rows: int) -> Tensor:
        """Strings as long as the longest of training, `skewed` of them with frequencies as there: ids (rows l)."""
        rng = np.random.default_rng([self.seed, 1 << 43])
        weights = symbol_weights(rng, rows, self.language.num_symbols, self.training.skewed)
        return torch.from_numpy(self.language.draw(rng, rows, self.max_length, weights=weights)[0].copy())

    def stream(self, rows: int, length: int, chunk: int = 1000) -> Iterator[tuple[Tensor, Tensor]]:
        """`rows` strings of `length` symbols in chunks: (ids, labels at every prefix), the automaton's state
        carried."""
        rng = np.random.default_rng([self.seed, 1 << 42])
        state = None
        for start in range(0, length, chunk):
            ids, states = self.language.draw(rng, rows, min(chunk, length - start), state)
            state = states[:, -1]
            yield torch.from_numpy(ids.copy()), torch.from_numpy(answers(self.language, states))


def _slices(strings: Strings, rows: int) -> Iterator[Strings]:
    for start in range(0, len(strings.ids), rows):
        yield Strings(*(part[start : start + rows] for part in strings))
