"""stack_step layer by layer, through the operators of single layers, whose fastest backends serve."""

from __future__ import annotations

from torch import Tensor

from ssmzoo.ops.mamba2_step import mamba2_step
from ssmzoo.ops.mamba_step import mamba_step
from ssmzoo.ops.rms_norm import rms_norm
from ssmzoo.ops.stack_step import layer_by_layer, stack_step


@stack_step.register("torch")
def stack_step_torch(a) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    return layer_by_layer(a.x, a.layers, a.states, rms_norm, mamba_step, mamba2_step)
