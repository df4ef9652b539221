"""Progressive training: one loader after another, each for so many batches, resumable at any batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ssmzoo.data.loader import ResumableLoader


class StagedLoader:
    """`stages` [(shuffled loader, batches)] in sequence; one epoch is the whole schedule, later ones the last stage."""

    def __init__(self, stages: list[tuple[ResumableLoader, int]]):
        if not stages or any(batches < 1 for _, batches in stages):
            raise ValueError("a schedule needs at least one stage, and every stage at least one batch")
        self.stages, self.stage, self.done = stages, 0, 0  # done: batches of this stage

    def __len__(self) -> int:
        return sum(batches for _, batches in self.stages)

    @property
    def waited(self) -> float:
        return sum(loader.waited for loader, _ in self.stages)

    def __iter__(self) -> Iterator[Any]:
        while True:
            loader, batches = self.stages[self.stage]
            for batch in loader:  # one epoch of this loader at most; it goes on where it stopped
                self.done += 1
                last = self.done == batches
                if last:
                    finished = self.stage == len(self.stages) - 1
                    self.stage, self.done = (self.stage, 0) if finished else (self.stage + 1, 0)
                yield batch
                if last and finished:
                    return
                if last:
                    break

    def state_dict(self) -> dict[str, Any]:
        return {"stage": self.stage, "done": self.done, "loader": self.stages[self.stage][0].state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stage, self.done = state["stage"], state["done"]
        self.stages[self.stage][0].load_state_dict(state["loader"])
