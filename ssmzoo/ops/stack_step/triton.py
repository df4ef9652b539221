"""stack_step on our GPU kernels: the norm and the residual connection of a layer belong to its first and last product,
so that a layer is four launches (Mamba) or three (Mamba-2) and nothing else."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmzoo.ops.mamba2_step import mamba2_step
from ssmzoo.ops.mamba2_step import triton as mamba2
from ssmzoo.ops.mamba_step import mamba_step
from ssmzoo.ops.mamba_step import triton as mamba
from ssmzoo.ops.stack_step import Integers, MambaLayer, stack_step
from ssmzoo.ops.triton import DEVICE, MISSING, on_device_of


def why_not(a) -> str | None:
    if torch.is_grad_enabled():
        return "serves decoding: without gradients"
    if a.x.shape[0] > mamba.MAX_ROWS:
        return f"serves up to {mamba.MAX_ROWS} sequences, got {a.x.shape[0]}; the torch form multiplies matrices"
    tensors = [a.x]
    for layer, state in zip(a.layers, a.states):
        for t in (*layer, *state):
            if isinstance(t, Integers):
                return "multiplies with floats; the torch form takes matrices of integers"
            if isinstance(t, Tensor):
                tensors.append(t)
    return mamba.why_not_tensors(*tensors)


@stack_step.register("triton", device=DEVICE, missing=MISSING, unsupported=why_not)
def stack_step_triton(a) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    x, new = a.x, []
    with on_device_of(x):
        for layer, (conv, ssm) in zip(a.layers, a.states, strict=True):
            first = type(layer) is MambaLayer
            step, advance = (mamba_step, mamba.advance_layer) if first else (mamba2_step, mamba2.advance_layer)
            x, *state = advance(step.Arguments(x, conv, ssm, *layer[2:]), layer.norm, layer.eps, residual=True)
            new.append(tuple(state))
    return x, new
