"""Text as a mixture of Birdie's objectives, packed into rows."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssmzoo.data.birdie.mixtures import Configuration, configurations
from ssmzoo.data.birdie.objectives import Sample
from ssmzoo.data.birdie.packing import Row, pack
from ssmzoo.data.formal_strings import BatchStream, FixedBatches
from ssmzoo.data.loader import is_fitting
from ssmzoo.data.text import TextData
from ssmzoo.data.text_store import Split

VALIDATION = 1 << 40  # apart from the numbers of training batches
TRIES = 20  # to find a text that an objective can use
START = 2  # the start token among the bytes; texts do not hold it


class BirdieData(TextData):
    """Rows of packed samples, each of an objective drawn by the mixture's weights.

    mixture     birdie (the weights are moved by task=birdie), fixed, ul2, ul2_denoisers, next_token
    objectives  in place of the configurations of birdie and fixed: [{objective: infilling, rate: 0.15, span: 3,
                weight: 1}, ...] with the arguments of ssmzoo.data.birdie.objectives
    seq_len     positions per row; shortest: least positions of a sample (a quarter of a row if not given)
    val_rows    rows per objective that are validated on
    path, corpus, tokenizer, bpe_vocab_size, batch_size, val_fraction, seed, cache_dir, text_field, end_token: as for
    TextData. The token that starts an answer is byte 2, or a new one behind another tokenizer's vocabulary.

    A batch is {"input_ids" (b l), "labels" (b l), "seq_idx" (b l), "prefix" (b l) bool}: labels are -100 but in the
    answers; seq_idx numbers the samples, and 0 is padding; prefix says what may be read in both directions. In
    validation also "objective" (b), an index into `names`. A batch is a function of its number and of `weights`.

    Raises ValueError for arguments out of range, and for objectives that find no room in a row.
    """

    default_task = "birdie"

    def __init__(
        self,
        mixture: str = "birdie",
        objectives: Sequence[Mapping[str, Any]] | None = None,
        path: str | None = None,
        corpus: dict | None = None,
        tokenizer: str | dict = "bytes",
        bpe_vocab_size: int | None = None,
        seq_len: int = 512,
        shortest: int | None = None,
        batch_size: int = 8,
        val_fraction: float = 0.05,
        val_rows: int = 4,
        seed: int = 0,
        cache_dir: str | None = None,
        text_field: str | None = None,
        end_token: str | None = "auto",
        selection: dict | None = None,
    ):
        super().__init__(
            path,
            corpus,
            tokenizer,
            bpe_vocab_size,
            seq_len,
            batch_size,
            val_fraction,
            seed=seed,
            cache_dir=cache_dir,
            text_field=text_field,
            end_token=end_token,
            selection=selection,
        )
        self.mixture, self.objectives = mixture, configurations(mixture, objectives)
        self.shortest, self.val_rows = max(1, seq_len // 4) if shortest is None else shortest, val_rows
        if not 1 <= self.shortest <= seq_len:
            raise ValueError(f"data.shortest = {shortest}; it must lie between 1 and data.seq_len = {seq_len}")
        if val_rows < 1:
            raise ValueError(f"data.val_rows = {val_rows}; it must be at least 1")
        self.set_weights([c.weight for c in self.objectives])
        self._ids = functools.cache(lambda text: tuple(self.tokenizer.encode(text)))  # of markers
        self._validation: list[dict[str, Tensor]] | None = None

    # Lightning's hooks

    def setup(self, stage: str | None = None) -> None:
        super().setup(stage)
        self._validation_batches()

    def train_dataloader(self) -> BatchStream:
        trainer = self.trainer
        rank, world = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        return BatchStream(self.training_batch, rank=rank, world_size=world)

    def val_dataloader(self) -> FixedBatches:
        return FixedBatches(self._validation_batches())

    def state_dict(self) -> dict:
        about = {"mixture": self.mixture, "objectives": self.names, "shortest": self.shortest}
        return super().state_dict() | about | {"weights": self.weights.tolist()}

    def load_state_dict(self, state: dict) -> None:
        """Refuse to continue a run on other data than it began with; go on with the weights it had."""
        super().load_state_dict(state | {"weights": self.weights.tolist()})
        if is_fitting(self):
            self.set_weights(state["weights"])

    # What others may ask

    @property
    def names(self) -> list[str]:
        """Of the objectives, with their numbers."""
        return [c.name for c in self.objectives]

    @property
    def adaptive(self) -> bool:
        """Whether the weights are the task's to move."""
        return self.mixture == "birdie"

    @property
    def start_id(self) -> int:
        """The token that stands before an answer."""
        return START if self.tokenizer.name == "bytes" else self.tokenizer.vocab_size

    @property
    def sizes(self) -> dict[str, int]:
        return {"vocab_size": max(self.tokenizer.vocab_size, self.start_id + 1)}

    def describe(self) -> dict:
        return super().describe() | {"mixture": self.mixture, "objectives": self.names}

    def set_weights(self, weights: Sequence[float]) -> None:
        """How often each objective is drawn from the next batch on; any positive multiple of probabilities."""
        weights = np.asarray(weights, dtype=np.float64)
        if weights.shape != (len(self.objectives),) or not (weights >= 0).all() or not 0 < weights.sum() < np.inf:
            raise ValueError(f"{len(self.objectives)} objectives want as many weights from 0, got {weights.tolist()}")
        self.weights = weights / weights.sum()

    def training_batch(self, number: int) -> dict[str, Tensor]:
        """Batch `number` of training; the same every time while the weights are."""
        rng = np.random.default_rng([self.seed, number])
        return _batch([self._row(rng, self._side("train")) for _ in range(self.batch_size)])

    def prefix_prompt(self, text: str | Sequence[int]) -> list[int]:
        """What asks a model for the continuation of a text (prefix language modelling)."""
        return [*self._ids("<|PREFIX LM|>"), *(self.encode(text) if isinstance(text, str) else text), self.start_id]

    # How it is done

    def _validation_batches(self) -> list[dict[str, Tensor]]:
        """One batch per objective, the same in every run of this seed."""
        if self._validation is None:
            side, found = self._side("val"), []
            for i, objective in enumerate(self.objectives):
                rng = np.random.default_rng([self.seed, VALIDATION + i])
                rows = [self._row(rng, side, objective) for _ in range(self.val_rows)]
                found.append(_batch(rows) | {"objective": torch.full((self.val_rows,), i)})
            self._validation = found
        return self._validation

    def _row(self, rng: np.random.Generator, side: Split, objective: Configuration | None = None) -> Row:
        samples, left = [], self.seq_len
        while left >= self.shortest:
            chosen = objective or self.objectives[rng.choice(len(self.objectives), p=self.weights)]
            sample = self._sample(rng, side, chosen, left)
            if sample is None and samples:  # no room for this one behind the others
                break
            if sample is None:
                raise ValueError(
                    f"data.objectives: {chosen.name} found no text and room in a row of data.seq_len = {self.seq_len}; "
                    f"give longer rows or leave it out"
                )
            samples.append(sample)
            left -= len(sample.inputs) + len(sample.labels)
        return pack(samples, self.seq_len, self.start_id)

    def _sample(self, rng: np.random.Generator, side: Split, objective: Configuration, left: int) -> Sample | None:
        """Of a random size up to `left`; of all of it where the objective needs more room."""
        for attempt in range(TRIES):
            tokens = self._text(rng, side)
            space = left if attempt else int(rng.integers(self.shortest, left + 1))
            if (sample := objective.make(tokens, space, rng, self._ids)) is not None:
                return sample
        return None

    def _text(self, rng: np.random.Generator, side: Split) -> np.ndarray:
        """A stretch of one document, up to a row long."""
        start = int(rng.integers(len(side.tokens)))
        document = int(np.searchsorted(side.starts, start, side="right"))
        end = int(side.starts[document]) if document < len(side.starts) else len(side.tokens)
        first = int(side.starts[document - 1])
        start = max(first, min(start, end - self.seq_len))  # as long as the document allows
        return np.asarray(side.tokens[start : min(end, start + self.seq_len)], dtype=np.int64)


def _batch(rows: list[Row]) -> dict[str, Tensor]:
    stacked = {name: torch.from_numpy(np.stack([getattr(row, name) for row in rows])) for name in Row._fields}
    prefix = torch.from_numpy(np.stack([row.prefix for row in rows]))
    return {
        "input_ids": stacked["input_ids"],
        "labels": stacked["labels"],
        "seq_idx": stacked["segment_ids"].int(),
        "prefix": prefix,
    }
