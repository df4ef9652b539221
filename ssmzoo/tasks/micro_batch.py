"""When memory runs out in a training step: the same batch in halves, quarters, ..., with the same gradient on average.

The parts are checkpointed one by one (torch.utils.checkpoint): their activations are dropped after the forward pass and
recomputed in the backward pass, so that at any time only one part's are held. Lightning, the precision and DDP see one
step and one backward as before; the price is one more forward pass per step from then on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from ssmzoo.tasks.base import StepOutput, Task


def is_out_of_memory(error: BaseException) -> bool:
    """torch's error for accelerators, or what its CPU allocator raises."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def split(batch: dict[str, Any], parts: int) -> list[dict[str, Any]]:
    """`parts` batches of nearly equal size; every tensor and list of a batch has one entry per sample."""
    size = batch_size(batch)
    edges = [size * i // parts for i in range(parts + 1)]
    return [{k: v[a:b] for k, v in batch.items()} for a, b in zip(edges, edges[1:])]


def batch_size(batch: dict[str, Any]) -> int:
    return len(next(iter(batch.values())))


class MicroBatches:
    """`step(task, batch)` in as many parts as memory asks for; one object per task.

    enabled  whether to halve at all (callbacks.guards.halve_batch)
    parts    how many parts a batch is cut into now; kept in checkpoints
    """

    def __init__(self) -> None:
        self.enabled, self.parts = False, 1
        self._window: list[tuple[dict[str, Any], Tensor | float]] = []  # batches of this update so far, and weights

    def step(self, task: Task, batch: dict[str, Any], batch_idx: int, weight: Tensor | float) -> StepOutput:
        """What `task.step(batch, training=True)` returns; halves when memory runs out in the forward pass."""
        if not self.enabled:
            return task.step(batch, training=True)
        if batch_idx % task.trainer.accumulate_grad_batches == 0:
            self._window = []
        self._window.append((batch, weight))
        return self._step(task, batch)

    def _step(self, task: Task, batch: dict[str, Any]) -> StepOutput:
        while True:
            try:
                return self._in_parts(task, batch)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                self._halve(task, batch, error)

    def _in_parts(self, task: Task, batch: dict[str, Any]) -> StepOutput:
        if self.parts == 1:
            return task.step(batch, training=True)

        def one(part: dict[str, Any]) -> StepOutput:
            return task.step(part, training=True)

        size = batch_size(batch)
        parts = split(batch, min(self.parts, size))
        outs = [checkpoint(one, part, use_reentrant=False) for part in parts]
        counts = [_items(task, part, size) for part in parts]
        weights = [count / sum(counts) for count in counts]

        def mean(values) -> Tensor:
            return sum(value * weight for value, weight in zip(values, weights))

        metrics = {k: mean([o.metrics[k] for o in outs]) for k in outs[0].metrics}
        auxiliary = None if outs[0].auxiliary is None else mean([o.auxiliary for o in outs])
        return type(outs[0])(mean([o.loss for o in outs]), metrics, sum(o.count for o in outs), auxiliary)

    def _halve(self, task: Task, batch: dict[str, Any], error: BaseException) -> None:
        """Twice as many parts, or the error when a part is a single sample already."""
        size = batch_size(batch)
        if self.parts >= size:
            raise error
        self.parts *= 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        print(
            f"warning: out of memory at step {task.trainer.global_step}: each batch of {size} is computed in "
            f"{self.parts} parts from now on; updates stay those of the whole batch and take about a third longer "
            f"(lower data.batch_size and raise trainer.accumulate_grad_batches to avoid that)",
            flush=True,
        )

    def retry(self, task: Task, loss: Tensor, error: BaseException) -> None:
        """After memory ran out in a backward pass: drop what it left, and compute the update's gradients so far anew.

        Raises the error where that cannot be: on several ranks, whose sums would no longer agree, and with fp16's
        scaled losses.
        """
        trainer = task.trainer
        if not self.enabled or trainer.world_size > 1 or trainer.precision == "16-mixed":
            raise error
        loss.detach_()  # lets go of the graph and of what it holds
        self._halve(task, self._window[-1][0], error)
        while True:
            task.zero_grad()
            try:
                for place, (batch, weight) in enumerate(self._window):
                    task.shares.turn_to(place)
                    with trainer.precision_plugin.train_step_context():
                        again = task.weighted_loss(self._in_parts(task, batch), weight)
                    (again / trainer.accumulate_grad_batches).backward()
                return
            except Exception as failed:
                if not is_out_of_memory(failed):
                    raise
                self._halve(task, batch, failed)


def _items(task: Task, part: dict[str, Any], size: int) -> float:
    """What a part counts in the mean loss: its labelled items, or its samples."""
    labelled = task.labelled(part)
    return batch_size(part) / size if labelled is None else float(labelled)
