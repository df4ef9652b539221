"""gated_layer_norm on our GPU kernels (triton_kernels.py): one pass over memory each way."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from ssmzoo.ops.gated_layer_norm import gated_layer_norm
from ssmzoo.ops.gated_layer_norm.torch import NORM
from ssmzoo.ops.library import Kernel
from ssmzoo.ops.rms_norm.triton import rows_of, tiles, why_not
from ssmzoo.ops.triton import DEVICE, MISSING, on_device_of
from ssmzoo.ops.triton.variants import DTYPES, Passes, Variant, meta, train

PASSES = {"forward": Passes(("R", "D"), most=150), "backward": Passes(("R", "D"), ("passes",), most=150)}

WIDEST = 4096  # numbers of a row: the backward of 8192 spills registers


def forward(a, save: bool):
    """Nothing is kept: the backward finds a row's moments again, as it reads the whole row."""
    from ssmzoo.ops.gated_layer_norm import triton_kernels as kernels

    x, z, y, d = rows_of(a.x), rows_of(a.z), a.x.new_empty(a.x.shape), a.x.shape[-1]
    if x.numel():
        options, _, _ = tiles(len(x), d)
        given = x, z, a.weight.contiguous(), a.bias.contiguous(), y, x.stride(0), z.stride(0)
        with on_device_of(x):
            kernels.forward[(-(-len(x) // options["R"]),)](*given, len(x), d, a.eps, **options)
    return (y,), None


def backward(a, _, dy: Tensor) -> dict[str, Tensor]:
    from ssmzoo.ops.gated_layer_norm import triton_kernels as kernels

    x, z, grads, d = rows_of(a.x), rows_of(a.z), NORM.contiguous_gradients(a), a.x.shape[-1]
    if not x.numel():
        return {name: g.zero_() for name, g in grads.items()}
    options, programs, passes = tiles(len(x), d)
    sums = x.new_empty(programs, 2, d, dtype=torch.float32)
    given = x, z, a.weight.contiguous(), a.bias.contiguous(), dy.contiguous(), grads["x"], grads["z"], sums
    with on_device_of(x):
        kernels.backward[(programs,)](*given, x.stride(0), z.stride(0), len(x), d, passes, a.eps, **options)
    dweight, dbias = sums.sum(0)
    grads["weight"].copy_(dweight)
    grads["bias"].copy_(dbias)
    return grads


NORM.kernels["triton"] = Kernel(forward, backward)
gated_layer_norm.register(
    "triton", device=DEVICE, missing=MISSING, unsupported=lambda a: why_not(a.x, a.z, a.weight, a.bias, widest=WIDEST)
)(lambda a: NORM(a, "triton"))


def variants() -> Iterator[Variant]:
    for dtype, kind in DTYPES.items():
        for d, typical in ((384, dtype == "bf16"), (4096, False)):
            a = gated_layer_norm.Arguments(*(meta(16384, d, dtype=kind) for _ in "xz"), meta(d), meta(d))
            run = functools.partial(train, NORM.kernels["triton"], a)
            yield Variant(f"{dtype}, 16384 rows of {d}", run, typical=typical)
