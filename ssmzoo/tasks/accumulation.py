"""What a micro-batch counts within an update, so that the update's gradient is that of one large batch.

An update averages over the ranks and over the micro-batches of `trainer.accumulate_grad_batches`. With c labelled items
in a micro-batch and C in all W x k of them, its mean loss must count W k c / C; padding, ignored labels and the short
last window of an epoch make this differ from 1. Mixtures of experts need more: the balancing loss multiplies shares of
the whole batch, and the capacity is the whole batch's, so the choices of all micro-batches are counted in a pass
without gradient first (a third more time; only when gradients are accumulated).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssmzoo.layers.feedforward.router import TokenChoice, Window


class Shares:
    """`of(task, batch, batch_idx)`: the factor of a micro-batch's mean loss. One object per task; see above."""

    def __init__(self) -> None:
        self.filling = 1.0  # k over the micro-batches that the window really has
        self._total: Tensor | None = None
        self._routers: list[TokenChoice] | None = None

    def of(self, task, batch: dict[str, Tensor], batch_idx: int) -> Tensor | float:
        trainer = task.trainer
        k, world = trainer.accumulate_grad_batches, trainer.world_size
        if k == 1 and world == 1:
            return 1.0
        own, place = task.labelled(batch), batch_idx % k
        if place == 0 or self._total is None:
            window = self._open(task, batch, batch_idx, k, own is not None)
            self._total = None
            if own is not None:
                self._total = sum(task.labelled(b).to(own.device) for b in window)
                if world > 1:
                    self._total = trainer.strategy.reduce(self._total.clone(), reduce_op="sum")
        self.turn_to(place)
        return self.filling if own is None else own.double() * (k * world) / self._total.clamp(min=1)

    def turn_to(self, place: int) -> None:
        """The micro-batch at `place` of the window comes next."""
        for router in self._routers or ():
            router.window.index = place

    def _open(self, task, batch, batch_idx: int, k: int, uneven: bool) -> list[dict[str, Tensor]]:
        """The micro-batches of this window (only this one where the others need not be known)."""
        batches = task.trainer.num_training_batches  # of an epoch; may be infinite
        size = int(min(k - batch_idx % k, batches - batch_idx))
        self.filling = k / size
        if k == 1:
            return [batch]
        if self._routers is None:
            self._routers = [m for m in task.model.modules() if isinstance(m, TokenChoice)]
        if not (uneven or self._routers):
            return [batch]
        window = [batch, *task.trainer.train_dataloader.peek(size - 1)]
        if self._routers:
            self._count_choices(task, window)
        return window

    @torch.no_grad()
    def _count_choices(self, task, window: list[dict[str, Tensor]]) -> None:
        tokens = sum(int(b["mask"].sum()) if "mask" in b else b["input_ids"].numel() for b in window)
        for router in self._routers:
            router.window = Window(tokens, len(window))
        device = task.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):  # the real pass draws the same
            for place, batch in enumerate(window):
                for router in self._routers:
                    router.window.index = place
                task.step({k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}, training=True)
        for router in self._routers:
            router.window.close()
