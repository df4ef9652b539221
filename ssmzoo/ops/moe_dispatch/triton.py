"""The experts' products on our GPU kernels (triton_kernels.py), where torch's grouped_mm would wait for the sizes of
the groups: on cards before Hopper, in float32 and float16, and for widths that are no multiple of 16 bytes."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from ssmzoo.ops.checks import why_not_float
from ssmzoo.ops.triton import INTERPRETED, MISSING, on_device_of, power_of_2
from ssmzoo.ops.triton.variants import DTYPES, Passes, Variant, meta

ROWS, COLUMNS, INNER = 64, 64, 32  # of a tile
HOPPER = (9, 0)
PASSES = {  # passes of the usual call below: over 512 columns of x, over the 256 rows of a group
    "multiply": Passes(("M", "N", "K"), (512 // INNER,)),
    "outer": Passes(("M", "N", "K"), (256 // INNER,)),
}


def takes(x: Tensor, other: Tensor) -> bool:
    """Whether the kernels take these tensors, which lie on a GPU."""
    return x.is_cuda and MISSING is None and why_not_float(x, other) is None and x.dtype == other.dtype


def torch_waits(x: Tensor) -> bool:
    """Whether torch's grouped_mm is a loop over the groups here."""
    return x.dtype != torch.bfloat16 or torch.cuda.get_device_capability(x.device) < HOPPER


def _options(x: Tensor) -> dict:
    exact = x.dtype == torch.float32  # experts are trained in it: three products would do, but only on some cards
    return {
        "PRECISION": "ieee" if exact else "tf32",
        "WIDE": INTERPRETED,
        "M": ROWS,
        "N": COLUMNS,
        "K": INNER,
        "num_warps": 4,
    }


def multiply(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """`grouped_matmul`"""
    from ssmzoo.ops.moe_dispatch import triton_kernels as kernels

    (rows, width), (groups, _, columns) = x.shape, weight.shape
    out = x.new_empty(rows, columns)
    if out.numel():
        tiles = (-(-rows // ROWS) + groups + 1) * -(-columns // COLUMNS)
        sizes = rows, width, columns, groups, x.stride(), weight.stride()
        with on_device_of(x):
            kernels.multiply[(tiles,)](x, weight, ends, out, *sizes, G=power_of_2(groups + 1), **_options(x))
    return out


def outer(x: Tensor, y: Tensor, ends: Tensor) -> Tensor:
    """The gradient of its weights, (e d f)."""
    from ssmzoo.ops.moe_dispatch import triton_kernels as kernels

    (rows, width), columns, groups = x.shape, y.shape[1], len(ends)
    out = x.new_empty(groups, width, columns)
    if out.numel():
        tiles = groups * -(-width // ROWS) * -(-columns // COLUMNS)
        with on_device_of(x):
            kernels.outer[(tiles,)](x, y, ends, out, rows, width, columns, x.stride(), y.stride(), **_options(x))
    return out


def variants() -> Iterator[Variant]:
    ends = meta(32, dtype=torch.int32)
    for dtype, kind in DTYPES.items():
        x, y = meta(8192, 512, dtype=kind), meta(8192, 2048, dtype=kind)
        weight = meta(32, 512, 2048, dtype=kind)
        usual = dtype == "fp32"  # bf16 is torch's own from Hopper on
        products = functools.partial(multiply, x, weight, ends), functools.partial(outer, x, y, ends)
        for run, what in zip(products, ("8192 x 512 x 2048", "gradient of the weights")):
            yield Variant(f"{dtype}, 32 experts, {what}", run, typical=usual)
