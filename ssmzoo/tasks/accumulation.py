"""What a micro-batch counts within an update, so that the update's gradient is that of one large batch.

An update averages over the ranks and over the micro-batches of `trainer.accumulate_grad_batches`. With c labelled items
in a micro-batch and C in all W x k of them, its mean loss must count W k c / C; padding, ignored labels and the short
last update of an epoch make this differ from 1. Mixtures of experts need more: the balancing loss multiplies shares of
the whole batch, and the capacity is the whole batch's, so the choices of all micro-batches are counted in a pass
without gradient first (a third more time; only when gradients are accumulated).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ssmzoo.layers.feedforward.router import TokenChoice, Window


def update_is_complete(trainer) -> bool:
    """Does an update end with the micro-batch at hand (the k-th, or the last of an epoch)?"""
    done = trainer.fit_loop.batch_idx + 1
    return done % trainer.accumulate_grad_batches == 0 or done >= trainer.num_training_batches or trainer.is_last_batch


class Update(NamedTuple):
    """The micro-batches whose gradients add up to one update.

    parts     k W: micro-batches of a whole update on all ranks
    filling   k over the micro-batches that this one really has
    labelled  items that its loss is a mean over, on all ranks; None: as many in every micro-batch
    routers   of mixtures of experts, which must know the micro-batch at hand; only when gradients are accumulated
    """

    parts: int = 1
    filling: float = 1.0
    labelled: Tensor | None = None
    routers: tuple[TokenChoice, ...] = ()

    def weight(self, own: Tensor | None, index: int) -> Tensor | float:
        """Factor on the mean loss of micro-batch number `index`, which has `own` labelled items."""
        for router in self.routers:
            router.window.index = index
        if own is None or self.labelled is None:
            return self.filling
        return own.double() * self.parts / self.labelled.clamp(min=1)


def routers_of(model: nn.Module) -> tuple[TokenChoice, ...]:
    return tuple(m for m in model.modules() if isinstance(m, TokenChoice))


@torch.no_grad()
def count_choices(
    routers: tuple[TokenChoice, ...], batches: list[dict[str, Any]], step: Callable, device: torch.device
) -> None:
    """Let the routers see all micro-batches of an update; random numbers stay those that the real pass draws."""
    tokens = sum(int(b["mask"].sum()) if "mask" in b else b["input_ids"].numel() for b in batches)
    for router in routers:
        router.window = Window(tokens, len(batches))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for index, batch in enumerate(batches):
            for router in routers:
                router.window.index = index
            step({k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}, training=True)
    for router in routers:
        router.window.close()
