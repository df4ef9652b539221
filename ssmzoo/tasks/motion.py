"""Stage 1 of MambaTalk: code books of the parts of a body, and the autoencoder of its translation."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ssmzoo.tasks.base import Report, StepOutput, Task
from ssmzoo.tasks.objectives.motion import part_loss


def codes_step(model, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, metrics) of a model that returns {part: VQOutput}: rebuilt motion, codes, translation."""
    out = model(batch)
    parts = [part for part in out if part != "global"]
    rebuilt = {part: part_loss(part, out[part].motion, batch[part]) for part in parts}
    moved = F.mse_loss(out["global"].motion[..., 54:57], batch["lower"][..., 54:57])
    loss = sum(rebuilt.values()) + sum(out[part].loss for part in parts) + moved
    metrics = {f"rec_{part}": value.detach() for part, value in rebuilt.items()}
    metrics |= {f"codes_{part}": out[part].code.unique().numel() + torch.zeros(()) for part in parts}
    return loss, metrics | {"translation": moved.detach()}


class MotionCoding(Task):
    """Train `MotionCodes`: rotations (radians), their changes, contacts, expressions, codes; all terms weigh 1."""

    unit = "windows"

    def step(self, batch: dict[str, Tensor], training: bool) -> StepOutput:
        loss, metrics = codes_step(self.model, batch)
        if training:
            self.model.trained += 1
        return StepOutput(loss, metrics, len(batch["whole"]))

    def report(self, run_dir: Path, validation: dict[str, float]) -> Report:
        rows = {"validation loss": f"{validation['loss']:.4f}"}
        for part in ("face", "upper", "hands", "lower"):
            used = f"about {validation[f'codes_{part}']:.0f} codes in a batch"
            rows[part] = f"rebuilt to a loss of {validation[f'rec_{part}']:.4f}, {used}"
        return Report(rows, {}, [])
