"""rms_norm on our GPU kernels (triton_kernels.py): one pass over memory each way, the residual stream within it."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from ssmzoo.ops.checks import why_not_float
from ssmzoo.ops.eager import eager
from ssmzoo.ops.library import Differentiable, Kernel
from ssmzoo.ops.rms_norm import rms_norm
from ssmzoo.ops.rms_norm.torch import NORM
from ssmzoo.ops.triton import DEVICE, MISSING, on_device_of, power_of_2
from ssmzoo.ops.triton.variants import DTYPES, Passes, Variant, meta, train

PASSES = {"forward": Passes(("R", "D"), most=100), "backward": Passes(("R", "D"), ("passes",), most=100)}

MOST_WARPS = 16 if torch.version.hip else 32  # of a program: 1024 threads
TILE, WIDEST = (
    2048,
    8192,
)  # numbers of a program's rows, and of one row, at most: the backward of 16384 spills registers
PROGRAMS = 512  # that share the rows of a backward pass, at most: each leaves a sum for the weight


def rows_of(x: Tensor) -> Tensor:
    """(... d) -> (rows d), any row stride."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def tiles(rows: int, d: int) -> tuple[dict, int, int]:
    """(sizes of a program, programs and passes of a backward)"""
    D = power_of_2(d)
    R = min(power_of_2(rows), max(1, TILE // D))
    blocks = -(-rows // R)
    passes = -(-blocks // PROGRAMS)
    return {"R": R, "D": D, "num_warps": max(1, min(MOST_WARPS, R * D // 256))}, -(-blocks // passes), passes


def forward(a, save: bool):
    """Nothing is kept: the backward finds a row's mean square again, as it reads the whole row."""
    from ssmzoo.ops.rms_norm import triton_kernels as kernels

    x, d, residual = rows_of(a.x), a.x.shape[-1], getattr(a, "residual", None)
    results = (a.x.new_empty(a.x.shape),)
    if residual is not None:
        results += (residual.new_empty(residual.shape),)
    if x.numel():
        options, _, _ = tiles(len(x), d)
        y, stream = results if len(results) == 2 else (*results, None)
        given = x, None if residual is None else residual.contiguous(), a.weight.contiguous(), y, stream
        with on_device_of(x):
            kernels.forward[(-(-len(x) // options["R"]),)](*given, x.stride(0), len(x), d, a.eps, **options)
    return results, results[1] if residual is not None else None


def _backward(a, stream: Tensor, dy: Tensor, dstream: Tensor | None, grads: dict[str, Tensor]) -> dict[str, Tensor]:
    from ssmzoo.ops.rms_norm import triton_kernels as kernels

    x, d = rows_of(stream), stream.shape[-1]
    if not x.numel():
        return {name: g.zero_() for name, g in grads.items()}
    options, programs, passes = tiles(len(x), d)
    sums = x.new_empty(programs, d, dtype=torch.float32)
    dstream = None if dstream is None else dstream.contiguous()
    given = x, a.weight.contiguous(), dy.contiguous(), dstream, grads["x"], grads.get("residual"), sums
    with on_device_of(x):
        kernels.backward[(programs,)](*given, x.stride(0), len(x), d, passes, a.eps, **options)
    grads["weight"].copy_(sums.sum(0))
    return grads


NORM.kernels["triton"] = Kernel(forward, lambda a, _, dy: _backward(a, a.x, dy, None, NORM.contiguous_gradients(a)))
ADD_NORM = Differentiable(
    "add_rms_norm",
    rms_norm.Arguments,
    ("y", "stream"),
    saved="stream",
    like=lambda a: (a.x.new_empty(a.x.shape), a.residual.new_empty(a.residual.shape)),
)
ADD_NORM.kernels["triton"] = Kernel(
    forward, lambda a, stream, dy, dstream: _backward(a, stream, dy, dstream, ADD_NORM.contiguous_gradients(a))
)


def why_not(*tensors: Tensor | None, widest: int = WIDEST) -> str | None:
    """The objections of the norms' kernels; the first tensor is (... d)."""
    if not eager(*tensors):
        return "is neither traced nor transformed: compilers fuse by themselves"
    if tensors[0].shape[-1] > widest:
        return f"holds rows of up to {widest} numbers on the chip, got {tensors[0].shape[-1]}"
    if not tensors[0].shape[-1]:
        return "has nothing to do for empty rows"
    return why_not_float(*tensors)


@rms_norm.register("triton", device=DEVICE, missing=MISSING, unsupported=lambda a: why_not(a.x, a.weight, a.residual))
def rms_norm_triton(a) -> Tensor | tuple[Tensor, Tensor]:
    return NORM(a, "triton") if a.residual is None else ADD_NORM(a, "triton")


def variants() -> Iterator[Variant]:
    for dtype, kind in DTYPES.items():
        for d, typical in ((768, dtype == "bf16"), (8192, False)):
            x, weight = meta(16384, d, dtype=kind), meta(d)
            add = rms_norm.Arguments(x, weight, residual=meta(16384, d))
            yield Variant(
                f"{dtype}, residual, d {d}",
                functools.partial(train, ADD_NORM.kernels["triton"], add, 1),
                typical=typical,
            )
            plain = rms_norm.Arguments(x, weight)
            yield Variant(f"{dtype}, d {d}", functools.partial(train, NORM.kernels["triton"], plain))
