"""Recall benches as a LightningDataModule: batches drawn by their number, fixed validation and test sets per case."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from ssmzoo.data.formal_strings import BatchStream, FixedBatches
from ssmzoo.data.loader import refuse_other_data
from ssmzoo.data.recall.associative import UPDATES
from ssmzoo.data.recall.benches import BENCHES, Case
from ssmzoo.data.recall.draws import Draws
from ssmzoo.suggest import nearest

CURRICULA = ("mixed", "increasing")
VALIDATION, TEST = 1 << 40, 1 << 41  # disjoint from the numbers of training batches


class RecallData(LightningDataModule):
    """Sequences in which something seen before is asked for; every batch has a single case, that is one length and
    number of pairs.

    bench          mqar, forgetting_mqar, compositional_mqar, disjoint_sets, selective_copying, induction_heads, parity,
                   majority, cumulative_parity, cumulative_majority, phone_book, needle
    vocab_size     tokens; None: the bench's usual number (64, 256, 16, ...)
    train, test    cases [[length, pairs], ...], or the two sizes that the bench has; None: usual ones, tested beyond
                   those trained. A training case given twice is drawn twice as often. Validation uses them too
    curriculum     mixed: any training case at any step; increasing: in the given order, `curriculum_steps` each
    power          mqar: weight i^(power - 1) of the i-th distance between pairs and question (published: 0.01)
    random_fillers mqar: random tokens instead of zeros between the questions
    updates        forgetting_mqar: keys that get a second value
    haystack       needle: text file, folder or glob as in TextData; None: the running Python's standard library
    batch_size     sequences per step and process;  val_samples, test_samples  sequences per case
    seed           of everything drawn

    A batch is {"input_ids" (b l), "labels" (b l)}, with labels -100 where nothing is asked; in validation also "case"
    (b 2). Raises ValueError for cases that do not fit, vocabularies too small, and arguments the bench does not have.
    """

    default_task = "recall"

    def __init__(
        self,
        bench: str = "mqar",
        vocab_size: int | None = None,
        train: list | None = None,
        test: list | None = None,
        curriculum: str = "mixed",
        curriculum_steps: int = 200,
        power: float | None = None,
        random_fillers: bool | None = None,
        updates: int | None = None,
        haystack: str | None = None,
        batch_size: int = 64,
        val_samples: int = 64,
        test_samples: int = 256,
        seed: int = 0,
    ):
        super().__init__()
        if bench not in BENCHES:
            raise ValueError(
                f"data.bench = '{bench}'{nearest(str(bench), BENCHES)}; choose one of {', '.join(BENCHES)}"
            )
        if curriculum not in CURRICULA:
            raise ValueError(f"data.curriculum = '{curriculum}'; choose one of {', '.join(CURRICULA)}")
        sizes = {"batch_size": batch_size, "val_samples": val_samples, "test_samples": test_samples}
        for name, value in (sizes | {"curriculum_steps": curriculum_steps}).items():
            if value < 1:
                raise ValueError(f"data.{name} = {value}; it must be at least 1")
        self.bench, self.make = bench, BENCHES[bench]
        self.vocab_size = self.make.vocab if vocab_size is None else vocab_size
        if self.make.fixed and self.vocab_size != self.make.vocab:
            raise ValueError(f"data.vocab_size = {vocab_size}; {bench} has {self.make.vocab} tokens")
        options = {"power": power, "random_fillers": random_fillers, "updates": updates, "haystack": haystack}
        self.options = {name: value for name, value in options.items() if value is not None}
        for name in self.options:
            if name not in self.make.options:
                fitting = [b for b, made in BENCHES.items() if name in made.options]
                raise ValueError(f"data.{name} does nothing for data.bench={bench}; it belongs to {', '.join(fitting)}")
        if power is not None and power <= 0:
            raise ValueError(f"data.power = {power}; it must be positive (published: 0.01)")
        self.train_cases = self._cases("train", train)
        self.test_cases = self._cases("test", test)
        self.curriculum, self.curriculum_steps = curriculum, curriculum_steps
        self.batch_size, self.val_samples, self.test_samples, self.seed = batch_size, val_samples, test_samples, seed
        self._texts: dict[str, np.ndarray] = {}

    def _cases(self, name: str, given: Sequence | None) -> list[Case]:
        cases = getattr(self.make, name) if given is None else [tuple(case) for case in given]
        axes = ", ".join(self.make.axes)
        for case in cases:
            if len(case) != 2 or any(not isinstance(v, int) or v < 1 for v in case):
                raise ValueError(f"data.{name} holds {list(case)}; give [[{axes}], ...] in positive whole numbers")
            reason = self.make.least(*case, self.vocab_size)
            updates = self.options.get("updates", UPDATES)
            if reason is None and self.bench == "forgetting_mqar" and not 1 <= updates <= case[1]:
                reason = f"data.updates = {updates} must lie between 1 and the number of pairs"
            if reason is not None:
                raise ValueError(f"data.{name} holds [{axes}] = {list(case)}: {reason}")
        if not cases:
            raise ValueError(f"data.{name} is empty; give [[{axes}], ...]")
        return list(cases)

    # Lightning's hooks

    def train_dataloader(self) -> BatchStream:
        attached = self.trainer is not None
        return BatchStream(
            self.training_batch,
            rank=self.trainer.global_rank if attached else 0,
            world_size=self.trainer.world_size if attached else 1,
        )

    def val_dataloader(self) -> FixedBatches:
        return FixedBatches(list(self._fixed(self.train_cases, self.val_samples, VALIDATION, "train")))

    def state_dict(self) -> dict:
        return self.describe()

    def load_state_dict(self, state: dict) -> None:
        refuse_other_data(self, state)

    # What others may ask

    @property
    def sizes(self) -> dict[str, int]:
        return {"vocab_size": self.vocab_size, "num_symbols": self.vocab_size, "num_classes": self.vocab_size}

    @property
    def axes(self) -> tuple[str, str]:
        """What the two numbers of a case are."""
        return self.make.axes

    def describe(self) -> dict:
        cases = [list(case) for case in self.train_cases]
        return {"bench": self.bench, "vocab_size": self.vocab_size, "train": cases, "seed": self.seed} | self.options

    def training_batch(self, number: int) -> dict[str, Tensor]:
        """Batch `number` of training; the same every time."""
        rng = np.random.default_rng([self.seed, number])
        if self.curriculum == "mixed":
            case = self.train_cases[rng.integers(len(self.train_cases))]
        else:
            case = self.train_cases[min(number // self.curriculum_steps, len(self.train_cases) - 1)]
        inputs, labels = self.draw(Draws(rng), self.batch_size, case, "train")
        return {"input_ids": torch.from_numpy(inputs), "labels": torch.from_numpy(labels)}

    def test_batches(self) -> Iterator[dict[str, Tensor]]:
        """`test_samples` sequences of every test case, never trained or validated on."""
        yield from self._fixed(self.test_cases, self.test_samples, TEST, "val")

    def draw(self, draws: Draws, n: int, case: Case, split: str = "train") -> tuple[np.ndarray, np.ndarray]:
        """(inputs (n l), labels (n l)) int64 of one case; `split`: the text that needles are hidden in."""
        options = {k: v for k, v in self.options.items() if k != "haystack"}
        if self.bench == "needle":
            options["haystack"] = self._text(split)
        return self.make.make(draws, n, *case, vocab_size=self.vocab_size, **options)

    def example(self, case: Case) -> Tensor:
        """ids (1 l) of one sequence of a case."""
        return torch.from_numpy(self.draw(Draws(self.seed), 1, case, "val")[0])

    # How it is done

    def _fixed(self, cases: list[Case], samples: int, kind: int, split: str) -> Iterator[dict[str, Tensor]]:
        for case in dict.fromkeys(cases):
            draws = Draws([self.seed, kind, *case])
            for start in range(0, samples, self.batch_size):
                n = min(self.batch_size, samples - start)
                inputs, labels = self.draw(draws, n, case, split)
                batch = {"input_ids": torch.from_numpy(inputs), "labels": torch.from_numpy(labels)}
                yield batch | {"case": torch.tensor(case).expand(n, 2)}

    def _text(self, split: str) -> np.ndarray:
        """Bytes of the corpus, whose held-out side the test reads."""
        if split not in self._texts:
            from ssmzoo.data.text import TextData

            corpus = TextData(path=self.options.get("haystack"))
            self._texts[split] = corpus.tokens(split)
            longest = max(length for length, _ in self.train_cases + self.test_cases)
            if len(self._texts[split]) <= longest:
                raise ValueError(f"data.haystack has {len(self._texts[split])} bytes, too few for {longest}")
        return self._texts[split]
