"""Stage 1 of MambaTalk: code books of the parts of a body, and the autoencoder of its translation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssmzoo.tasks.base import Report, StepOutput, Task
from ssmzoo.tasks.objectives.motion import changes, part_loss

PARTS = ("face", "upper", "hands", "lower")


def codes_step(model, batch: dict[str, Tensor], quantise: bool = True) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, metrics) of a model that returns {part: VQOutput}: rebuilt motion, codes, translation."""
    out = model(batch, quantise)
    parts = [part for part in out if part != "global"]
    rebuilt = {part: part_loss(part, out[part].motion, batch[part]) for part in parts}
    moved = [x[..., 54:57] for x in (out["global"].motion, batch["lower"])]
    moved = F.mse_loss(*moved) + changes(*moved)
    loss = sum(rebuilt.values()) + sum(out[part].loss for part in parts) + moved
    metrics = {f"rec_{part}": value.detach() for part, value in rebuilt.items()}
    metrics |= {f"codes_{part}": out[part].code.unique().numel() + torch.zeros(()) for part in parts}
    return loss, metrics | {"translation": moved.detach()}


def codes_training_step(model, batch: dict[str, Tensor], data, free_steps: int) -> tuple[Tensor, dict[str, Tensor]]:
    """codes_step of step number `model.trained`, which it counts.

    Before the first the networks start at the mean of the motion; for `free_steps` steps they are plain autoencoders;
    then the code books become means of their latents. Codes that start at random, as published, leave 2 to 11 of 64 in
    use after 600 steps (docs/LOG.md).
    """
    trained = int(model.trained)
    if trained == 0:
        model.start_at(many(data, PARTS, batch["face"].device))
    if trained == free_steps:
        model.fit_codes(many(data, PARTS, batch["face"].device))
    model.trained += 1
    return codes_step(model, batch, quantise=trained >= free_steps)


def many(data, parts: Sequence[str], device) -> dict[str, Tensor]:
    """These tensors of sixteen batches of training, (b ...) each."""
    batches = list(islice(endless(data), 16))
    return {part: torch.cat([batch[part] for batch in batches]).to(device) for part in parts}


def endless(data):
    """Batches of a loader of their own, so that the run's order stays what it is without them."""
    while True:
        yield from data.train_dataloader()


class MotionCoding(Task):
    """Train `MotionCodes`: rotations (radians), their changes, contacts, expressions, codes; all terms weigh 1.

    free_steps   without code books at first
    """

    unit = "windows"

    def __init__(self, model: nn.Module, optim: Callable[[nn.Module], Any] | None = None, free_steps: int = 60):
        super().__init__(model, optim)
        if free_steps < 0:
            raise ValueError(f"task.free_steps = {free_steps} must not be negative")
        self.free_steps = free_steps

    def step(self, batch: dict[str, Tensor], training: bool) -> StepOutput:
        if training:
            loss, metrics = codes_training_step(self.model, batch, self.trainer.datamodule, self.free_steps)
        else:
            loss, metrics = codes_step(self.model, batch)
        return StepOutput(loss, metrics, len(batch["whole"]))

    def report(self, run_dir: Path, validation: dict[str, float]) -> Report:
        rows = {"validation loss": f"{validation['loss']:.4f}"}
        for part in PARTS:
            used = f"about {validation[f'codes_{part}']:.0f} codes in a batch"
            rows[part] = f"rebuilt to a loss of {validation[f'rec_{part}']:.4f}, {used}"
        return Report(rows, {}, [])
