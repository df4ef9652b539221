"""quantized_linear of a few tokens on our GPU kernel (triton_kernels.py): every weight is read once, as it is stored.

Many tokens are left to torch, which writes the matrix out once and gives it to cuBLAS.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from ssmzoo.ops.checks import why_not_float
from ssmzoo.ops.eager import eager, needs_grad
from ssmzoo.ops.mamba_step.triton import why_not_tensors
from ssmzoo.ops.quantized_linear import DYNAMIC, LEAST_SCALE, quantized_linear
from ssmzoo.ops.triton import DEVICE, MISSING, on_device_of, power_of_2
from ssmzoo.ops.triton.variants import DTYPES, Passes, Variant, meta

PASSES = {"multiply": Passes(("E", "W"), (1,), most=60)}
MANY = 16  # tokens, each of which reads the weights by itself, from the cache
ROWS, COLUMNS = 8, 256  # of a program: rows, and bytes of one at a time, at most


def why_not(a) -> str | None:
    tensors = a.x, a.scale, a.zero, a.bias
    if needs_grad(*tensors):
        return "serves without gradients"
    if a.x.numel() == 0 or a.weight.numel() == 0:
        return "is given nothing to do"
    if a.x.numel() > MANY * a.x.shape[-1]:
        return f"multiplies up to {MANY} tokens, got {a.x.numel() // a.x.shape[-1]}; the torch form multiplies matrices"
    if not (eager(a.x) and a.weight.is_contiguous()):
        return "is neither traced nor transformed, and reads weights that are contiguous"
    return why_not_float(a.x) or why_not_tensors(*a[2:5])


def multiply(a) -> Tensor:
    from ssmzoo.ops.quantized_linear import triton_kernels as kernels

    x, (e, m), nibbles = a.x.contiguous(), a.scale.shape, a.bits == 4
    y = x.new_empty(*x.shape[:-1], e)
    act_scale = a.act_scale
    if isinstance(act_scale, (int, float)):
        act_scale = x.new_full((), act_scale, dtype=torch.float32)
    E = min(ROWS, power_of_2(e))
    kernels.multiply[-(-e // E), x.numel() // x.shape[-1]](
        x,
        a.weight,
        a.scale,
        a.zero,
        a.bias,
        act_scale if isinstance(act_scale, Tensor) else None,
        y,
        e,
        x.shape[-1],
        m,
        a.group_size,
        LEAST_SCALE,
        DYNAMIC=act_scale == DYNAMIC if isinstance(act_scale, str) else False,
        NIBBLES=nibbles,
        GROUPED=m > 1,
        E=E,
        W=min(COLUMNS, power_of_2(a.weight.shape[1])),
        num_warps=4,
    )
    return y


@quantized_linear.register("triton", device=DEVICE, missing=MISSING, unsupported=why_not)
def quantized_linear_triton(a) -> Tensor:
    with on_device_of(a.x):
        return multiply(a)


def variants() -> Iterator[Variant]:
    def call(kind, bits, group, e=3072, d=768, act_scale=None, zeros=False):
        weight = meta(e, d // 2, dtype=torch.uint8) if bits == 4 else meta(e, d, dtype=torch.int8)
        m = -(-d // group)
        a = quantized_linear.Arguments(
            meta(1, d, dtype=kind),
            weight,
            meta(e, m),
            meta(e, m) if zeros else None,
            meta(e, dtype=kind),
            bits=bits,
            group_size=group,
            act_scale=act_scale,
        )
        return functools.partial(multiply, a)

    bf16 = torch.bfloat16
    yield Variant("bf16, 4 bits, groups of 128, 3072 x 768", call(bf16, 4, 128), typical=True)
    yield Variant("bf16, 8 bits, a scale per row", call(bf16, 8, 768))
    yield Variant("bf16, 8 bits, activations by their largest", call(bf16, 8, 768, act_scale=DYNAMIC), typical=True)
    for dtype, kind in DTYPES.items():
        yield Variant(f"{dtype}, 4 bits, zeros, a scale for all activations", call(kind, 4, 128, 40, 36, 0.1, True))
