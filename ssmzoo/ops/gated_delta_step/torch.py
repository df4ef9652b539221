"""gated_delta_step in PyTorch: the reference, which is vectorised already."""

from __future__ import annotations

from torch import Tensor

from ssmzoo.ops.gated_delta_step import gated_delta_step


@gated_delta_step.register("torch")
def gated_delta_step_torch(a) -> tuple[Tensor, Tensor, Tensor]:
    return gated_delta_step.reference(*a)
