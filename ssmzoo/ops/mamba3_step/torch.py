"""mamba3_step in PyTorch: the reference is vectorised already."""

from __future__ import annotations

from torch import Tensor

from ssmzoo.ops.mamba3_step import mamba3_step


@mamba3_step.register("torch")
def mamba3_step_torch(a) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return mamba3_step.reference(*a)
