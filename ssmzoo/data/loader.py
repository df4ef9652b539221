"""One loader for every kind of data, whose order is a function of (seed, epoch, position) and nothing else.

Because no random state is consumed by drawing the order, a run continues in mid-epoch with exactly the batches it would
have seen, whatever the number of worker processes; and the ranks of a distributed run split each global batch without
repetition or loss.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from ssmzoo.data.shuffle import Permutation
from ssmzoo.data.workers import quiet_worker, replacing


class Draw(NamedTuple):
    """What a dataset's `__getitem__` receives: the sample's index, its own seed for augmentation, the epoch."""

    index: int
    seed: int
    epoch: int = 0


def draw_seed(seed: int, epoch: int, index: int) -> int:
    """A 63-bit seed for sample `index` in `epoch`: splitmix64 over the three numbers."""
    x = (seed * 0x9E3779B97F4A7C15 + epoch * 0xBF58476D1CE4E5B9 + index + 1) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return (x ^ (x >> 31)) >> 1


def is_fitting(data) -> bool:
    """Whether a data module is attached to a run that trains."""
    return data.trainer is not None and data.trainer.state.fn == "fit"


def refuse_other_data(data, state: dict[str, Any]) -> None:
    """Raise ValueError where a run goes on with other data than it began with, when their state_dict() was `state`."""
    for key, value in data.state_dict().items() if is_fitting(data) else ():
        if state.get(key) != value:
            raise ValueError(
                f"the run to be continued had data {key} = {state.get(key)}, now it is {value}; "
                f"continue with the same, or start a new run from the checkpoint's weights"
            )


class ResumableLoader:
    """Iterate over a map-style dataset in batches; `state_dict()` names the next batch exactly.

    dataset     `dataset[Draw(index, seed)]` -> sample; needs `__len__`
    batch_size  samples per batch on this rank; a global batch is batch_size * world_size consecutive draws
    shuffle     a fresh permutation per epoch, by (seed, epoch); False keeps the dataset's order
    drop_last   leave out an incomplete last batch
    collate_fn  list of samples -> batch; torch's default when None
    repeats     each image of a shuffled epoch is drawn so often, side by side and with seeds of its own, from a share
                1/repeats of the dataset: an epoch is as long as without (repeated augmentation, Hoffer et al. 2020)

    A shuffled loader goes on at every `iter()` where it stopped, to the end of the epoch, so that nothing is repeated
    or left out when a loop leaves early and comes back; its workers stay, and prepare the next epoch's first batches
    while this one ends. One that is not shuffled begins anew. With drop_last=False on several ranks the last batches
    differ in size by at most one sample (a rank may get none and then ends one batch earlier: use it for evaluation
    only).
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        *,
        shuffle: bool = False,
        drop_last: bool = False,
        seed: int = 0,
        num_workers: int = 0,
        collate_fn: Callable[[list], Any] | None = None,
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool = False,
        repeats: int = 1,
    ):
        if min(batch_size, repeats) < 1:
            raise ValueError(f"batch_size is {batch_size} and repeats {repeats}; both must be at least 1")
        self.dataset, self.batch_size, self.shuffle, self.drop_last = dataset, batch_size, shuffle, drop_last
        self.seed, self.num_workers, self.collate_fn = seed, num_workers, collate_fn
        self.repeats = repeats if shuffle else 1
        self.rank, self.world_size, self.pin_memory = rank, world_size, pin_memory
        self.epoch, self.position, self._resumed = 0, 0, False
        self.waited = 0.0  # seconds that whoever iterates has waited for batches
        self._iterator: Iterator[Any] | None = None  # over all epochs; Lightning sets this name to None after training
        if len(self) == 0:
            raise ValueError(
                f"{len(dataset)} samples do not fill one batch of {batch_size} on {world_size} rank(s); "
                f"lower data.batch_size or give more data"
            )

    def __len__(self) -> int:
        """Batches per epoch on this rank."""
        n, step = len(self.dataset), self.batch_size * self.world_size
        if self.drop_last:
            return n // step
        rest = max(0, n % step - self.rank)
        return n // step + (1 if rest > 0 else 0)

    def _epoch(self, epoch: int, start: int) -> Iterator[list[Draw]]:
        """What the batches of an epoch consist of, from number `start` on."""
        n, step = len(self.dataset), self.batch_size * self.world_size
        order = Permutation(n, draw_seed(self.seed, epoch, -1)) if self.shuffle else range(n)
        for batch in range(start, len(self)):
            mine = range(batch * step + self.rank, min(n, (batch + 1) * step), self.world_size)
            drawn = ((order[position // self.repeats], position % self.repeats) for position in mine)
            yield [Draw(i, draw_seed(self.seed, epoch, i + n * copy), epoch) for i, copy in drawn]

    def _epochs(self) -> Iterator[list[Draw]]:
        """From the next batch on: all epochs to come when shuffled, otherwise to the end of this one."""
        epoch, start = self.epoch, self.position  # which have moved on when this is done
        yield from self._epoch(epoch, start)
        while self.shuffle:
            epoch += 1
            yield from self._epoch(epoch, 0)

    def __iter__(self) -> Iterator[Any]:
        if not self.shuffle and not self._resumed:
            self.position = 0
        self._resumed = False
        batches = self._iterator or replacing(self._loader)
        if self.shuffle:
            self._iterator = batches
        for _ in range(len(self) - self.position):
            asked = time.perf_counter()
            batch = next(batches)
            self.waited += time.perf_counter() - asked
            self.position += 1
            if self.position == len(self):
                self.epoch, self.position = self.epoch + 1, 0
            yield batch

    def _loader(self) -> DataLoader:
        return DataLoader(
            self.dataset,
            batch_sampler=self._epochs(),
            num_workers=self.num_workers,
            collate_fn=self.collate_fn,
            pin_memory=self.pin_memory,
            worker_init_fn=quiet_worker,
            generator=torch.Generator().manual_seed(self.seed),
        )  # leaves the global random state alone

    def peek(self, count: int) -> list[Any]:
        """The next `count` batches of this epoch, which will be yielded all the same."""
        collate = self.collate_fn or default_collate
        draws = islice(self._epoch(self.epoch, self.position), count) if self.position else ()
        return [collate([self.dataset[draw] for draw in draw_list]) for draw_list in draws]

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue with the batch after the last one yielded before `state_dict()` was taken."""
        self.epoch, self.position, self._resumed = state["epoch"], state["position"], True
        self._iterator = None
