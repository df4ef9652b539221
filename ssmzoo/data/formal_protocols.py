"""Two more published protocols over the same automata: fixed sets of token ids (B) and word problems (C).

B, "fixedset": inputs and labels share one vocabulary, 0 pads on the right, the last real token carries the label,
lengths
   vary within a batch, and sample i is drawn under a seed of its own: the published data sets bit for bit.
   Source: IBM/expressive-sparse-state-space-model @8682e78, state_tracking_PyTorch/data_dir/fl_tasks.
C, "words": all elements of a group are symbols, the running product is the label at every token, [BOS] stands in
front of
   inputs and labels. Source: jopetty/word-problem @8f910f9 (arXiv 2404.08819).
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from ssmzoo.data.automata_library import automaton, word_problem
from ssmzoo.data.formal_strings import (
    IGNORE,
    BatchStream,
    FixedBatches,
    HeldOut,
    Strings,
    TrainingStrings,
    test_strings,
)

PAD = 0
FIXED_SETS = {  # name: (vocabulary, automaton, automaton's symbol of token 1, 2, ..., first label id)
    "parity": (3, "parity_check", (0, 1), None),
    "even_pairs": (3, "even_pairs", (0, 1), None),
    "cycle_nav": (9, "cycle_navigation", (1, 2, 0), 4),
    "mod_arith_no_brack": (10, "modular_arithmetic", None, 5),
}


class FixedSet:
    """Samples of protocol B by number: `samples(seed)` yields (ids, label id) for i = 0, 1, 2, ...

    parity, even_pairs  ids 1, 2; label 1 when the number of 2s is even / when first and last are equal, else 2
    cycle_nav           ids 1 stay, 2 forwards, 3 backwards; label 4 + position
    mod_arith_no_brack  1 '+', 2 '-', 3 '*', 4 '=', 5 to 9 digits; label 5 + value, read at the final '='
    """

    def __init__(self, name: str, min_length: int = 3, max_length: int = 40):
        if name not in FIXED_SETS:
            raise ValueError(f"data.language is {name!r}; the fixed sets are {', '.join(FIXED_SETS)}")
        if not 1 <= min_length <= max_length or (name == "mod_arith_no_brack" and max_length < 2):
            raise ValueError(
                f"data.min_length = {min_length} and data.max_length = {max_length} do not make a range of lengths"
            )
        self.name, self.min_length, self.max_length = name, min_length, max_length
        self.vocab_size, language, self.symbols, self.first_label = FIXED_SETS[name]
        self.automaton = automaton(language)

    def samples(self, seed: int) -> Iterator[tuple[Tensor, int]]:
        source = random.Random(seed)
        while True:
            generator = torch.Generator().manual_seed(source.randint(0, 2**32 - 1))
            yield self.draw(generator)

    def draw(self, generator: torch.Generator) -> tuple[Tensor, int]:
        length = int(torch.randint(self.min_length, self.max_length + 1, (1,), generator=generator))
        if self.name == "mod_arith_no_brack":
            length += length % 2
            ids = torch.empty(length, dtype=torch.int64)
            ids[0::2] = torch.randint(0, 5, (length // 2,), generator=generator) + 5
            ids[1:-1:2] = torch.randint(1, 4, (length // 2 - 1,), generator=generator)
            ids[-1] = 4
        else:
            ids = torch.randint(1, len(self.symbols) + 1, (length,), generator=generator)
        return ids, self.label(ids)

    def label(self, ids: Tensor) -> int:
        """The label id of one string of token ids."""
        tokens = ids.numpy()
        if self.name == "mod_arith_no_brack":
            tokens = tokens[:-1]  # the '=' is only the position of the answer
            symbols = np.where(tokens >= 5, tokens - 5, tokens + 4)
        else:
            symbols = np.array(self.symbols)[tokens - 1]
        answer = int(self.automaton.output[self.automaton.run(symbols[None])[0, -1]])
        return answer + (1 if self.first_label is None else self.first_label)

    def batch(self, samples: list[tuple[Tensor, int]]) -> dict[str, Tensor]:
        """Right-padded ids, mask of the real tokens, and the label at the last of them."""
        longest = max(len(ids) for ids, _ in samples)
        ids = torch.full((len(samples), longest), PAD)
        labels = torch.full_like(ids, IGNORE)
        for row, (sample, label) in enumerate(samples):
            ids[row, : len(sample)] = sample
            labels[row, len(sample) - 1] = label
        return {"input_ids": ids, "labels": labels, "mask": ids != PAD}


class FixedSetData(LightningDataModule):
    """Protocol B: 25.6 million indexed samples of lengths 3 to 40 in training, 8,192 of 40 to 256 in validation.

    language     parity, even_pairs, cycle_nav or mod_arith_no_brack
    batch_size, min_length, max_length   of training;  val_samples, val_max_length  of validation (from max_length on)
    num_samples  of training; afterwards they repeat
    seed         of the training set; the validation set has twice that seed, as published
    """

    default_task = "formal"

    def __init__(
        self,
        language: str = "parity",
        batch_size: int = 256,
        min_length: int = 3,
        max_length: int = 40,
        num_samples: int = 25_600_000,
        val_samples: int = 8192,
        val_max_length: int = 256,
        seed: int = 1234,
    ):
        super().__init__()
        if batch_size < 1 or val_samples < 1 or num_samples < batch_size:
            raise ValueError(
                f"data.batch_size = {batch_size} and data.val_samples = {val_samples} must be at least "
                f"1, and "
                f"data.num_samples = {num_samples} at least one batch"
            )
        self.train_set = FixedSet(language, min_length, max_length)
        self.val_set = FixedSet(language, max_length, val_max_length)
        self.batch_size, self.num_samples, self.val_samples, self.seed = batch_size, num_samples, val_samples, seed
        self.language = self.train_set.automaton
        self._source: Iterator | None = None
        self._next = -1

    @property
    def sizes(self) -> dict[str, int]:
        v = self.train_set.vocab_size
        return {"num_symbols": v, "num_classes": v, "vocab_size": v, "num_states": self.language.num_states}

    def describe(self) -> dict[str, str | int]:
        return {"language": self.train_set.name, "protocol": "fixedset", "seed": self.seed}

    def _batch(self, index: int) -> dict[str, Tensor]:
        index %= self.num_samples // self.batch_size
        if index != self._next or self._source is None:  # seeds form one stream: skip to the position
            self._source = self.train_set.samples(self.seed)
            skipped = random.Random(self.seed)
            for _ in range(index * self.batch_size):
                skipped.randint(0, 2**32 - 1)
            self._source = _resumed(self.train_set, skipped)
        self._next = index + 1
        return self.train_set.batch(list(islice(self._source, self.batch_size)))

    def train_dataloader(self) -> BatchStream:
        if self.trainer is not None and self.trainer.world_size > 1:
            raise ValueError(
                "data=formal_fixedset draws its samples in order and runs on one process; use trainer.devices=1"
            )
        return BatchStream(self._batch)

    def val_dataloader(self) -> FixedBatches:
        samples = list(islice(self.val_set.samples(2 * self.seed), self.val_samples))
        return FixedBatches([self.val_set.batch(samples[i : i + 64]) for i in range(0, len(samples), 64)])


def _resumed(fixed: FixedSet, source: random.Random) -> Iterator[tuple[Tensor, int]]:
    while True:
        yield fixed.draw(torch.Generator().manual_seed(source.randint(0, 2**32 - 1)))


class WordProblemData(LightningDataModule):
    """Protocol C: the running product of a group at every token, [BOS] in front.

    group         S<n>, A<n>, Z<n> or products such as A4_x_Z5
    max_length    k: training strings have 2 to k elements, or 2 and k with strict_len
    test_lengths  lengths at which validation reads token and sequence accuracy
    held_out      share of the strings of a length that is never trained on (published: 0.2)
    batch_size, val_samples, seed   strings per step, validation strings per length, everything drawn

    Vocabulary: the elements, then [PAD] n, [BOS] n+1, [UNK], [EOS], [SEP], [CLS], [MASK]. As published, the model is
    also
    trained to answer [BOS] at the first position. One length per batch: no [PAD] is ever trained.
    """

    SPECIAL = 7

    default_task = "formal"

    def __init__(
        self,
        group: str = "A5",
        batch_size: int = 512,
        max_length: int = 20,
        strict_len: bool = False,
        test_lengths: tuple[int, ...] | list[int] = (20, 40, 100),
        held_out: float = 0.2,
        val_samples: int = 256,
        seed: int = 0,
    ):
        super().__init__()
        if batch_size < 1 or val_samples < 1 or max_length < 2 or not test_lengths or min(test_lengths) < 1:
            raise ValueError(
                f"data: batch_size = {batch_size} and val_samples = {val_samples} must be at least 1, "
                f"max_length = "
                f"{max_length} at least 2, test_lengths = {list(test_lengths)} at least one positive "
                f"length"
            )
        if not 0 <= held_out <= 0.5:
            raise ValueError(f"data.held_out is {held_out}; give a share between 0 and 0.5")
        self.language = word_problem(group)
        self.batch_size, self.max_length, self.strict_len = batch_size, max_length, strict_len
        self.test_lengths, self.val_samples, self.seed = tuple(test_lengths), val_samples, seed
        self.held_out = HeldOut(self.language, held_out, max_length)
        self.training = TrainingStrings(
            self.language, self.held_out, batch_size, 1, max_length, "fixed", 1, "every", False, 0.0, seed
        )

    @property
    def sizes(self) -> dict[str, int]:
        v = self.language.num_states + self.SPECIAL
        return {"num_symbols": v, "num_classes": v, "vocab_size": v, "num_states": self.language.num_states}

    @property
    def bos(self) -> int:
        return self.language.num_states + 1

    def describe(self) -> dict[str, str | int]:
        return {"language": self.language.name, "protocol": "words", "max_length": self.max_length, "seed": self.seed}

    def _with_bos(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        front = torch.full((len(ids), 1), self.bos)
        return {"input_ids": torch.cat([front, ids], dim=1), "labels": torch.cat([front, labels], dim=1)}

    def _batch(self, index: int) -> dict[str, Tensor]:
        whole = self.training(index)
        pick = np.random.default_rng([self.seed, 1 << 43, index]).random()
        lengths = [2, self.max_length] if self.strict_len else list(range(2, self.max_length + 1))
        length = lengths[int(pick * len(lengths))]
        return self._with_bos(whole["input_ids"][:, :length], whole["labels"][:, :length])

    def train_dataloader(self) -> BatchStream:
        attached = self.trainer is not None
        return BatchStream(
            self._batch,
            rank=self.trainer.global_rank if attached else 0,
            world_size=self.trainer.world_size if attached else 1,
        )

    def val_dataloader(self) -> FixedBatches:
        rng, batches = np.random.default_rng([self.seed, 1 << 40]), []
        for length in self.test_lengths:
            found: Strings = test_strings(self.language, self.held_out, rng, self.val_samples, length)
            for start in range(0, self.val_samples, 64):
                ids, labels = (torch.from_numpy(np.ascontiguousarray(part[start : start + 64])) for part in found[:2])
                batches.append(self._with_bos(ids, labels))
        return FixedBatches(batches)
