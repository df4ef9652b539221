"""state_fusion on our GPU kernels (triton_kernels.py), and what spatial_scan makes of the fused states."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ssmzoo.ops.checks import why_not_float
from ssmzoo.ops.library import Differentiable, Kernel
from ssmzoo.ops.state_fusion import state_fusion, taps
from ssmzoo.ops.triton import DEVICE, MISSING, on_device_of, power_of_2, strides
from ssmzoo.ops.triton.variants import DTYPES, Passes, Variant, meta, train

PASSES = {name: Passes(("E", "P"), most=1500) for name in ("forward", "backward_weights", "backward_inputs")}
TILE, CHANNELS = 512, 16  # numbers of a tile; its channels where they lie next to each other


class Inputs(NamedTuple):
    """x (b c h w) any strides, weight (c 27) fp32; C (b h w), D (c) fp32 and u (b c h w): y = C fused(x) + D u."""

    x: Tensor
    weight: Tensor
    C: Tensor | None
    D: Tensor | None
    u: Tensor | None


def result(a: Inputs) -> Tensor:
    """Uninitialised y, laid out as x is."""
    if a.C is None:
        return torch.empty_like(a.x)
    dtype = torch.promote_types(torch.promote_types(a.u.dtype, a.C.dtype), a.D.dtype)
    return torch.empty_like(a.u, dtype=dtype)


def _launch(x: Tensor) -> tuple[tuple[int], int, dict]:
    """(grid, tiles of a map, options)"""
    b, c, h, w = x.shape
    E = min(power_of_2(c), CHANNELS if x.stride(1) == 1 and x.stride(3) != 1 else 1)
    P = min(power_of_2(h * w), TILE // E)
    tiles = -(-h * w // P)
    return (b * -(-c // E) * tiles,), tiles, {"E": E, "P": P, "num_warps": 4}


def forward(a: Inputs, save: bool):
    from ssmzoo.ops.state_fusion import triton_kernels as kernels

    y = result(a)
    grid, _, options = _launch(a.x)
    with on_device_of(a.x):
        kernels.forward[grid](
            *a[:2], a.C, whole(a.D), a.u, y, *map(strides, (a.x, a.C, a.u, y)), *sizes(a.x), **options
        )
    return (y,), None


def whole(D: Tensor | None) -> Tensor | None:
    return None if D is None else D.float()


def sizes(x: Tensor) -> tuple[int, int, int]:
    return x.shape[2], x.shape[3], x.shape[1]


def backward(a: Inputs, saved: None, dy: Tensor) -> dict[str, Tensor]:
    from ssmzoo.ops.state_fusion import triton_kernels as kernels

    b, c, h, w = a.x.shape
    grid, tiles, options = _launch(a.x)
    new = a.weight.new_empty
    dweight, wide = new(b, tiles, c, 27), new(b, h + 10, w + 10, c).permute(0, 3, 1, 2)
    dC, dD, du = None, None, None
    if a.C is not None:
        dC, dD = new(-(-c // options["E"]), b, h, w), new(b, tiles, c)
        du = torch.empty_like(a.u)
    with on_device_of(a.x):
        kernels.backward_weights[grid](
            dy,
            *a[:2],
            a.C,
            whole(a.D),
            a.u,
            dweight,
            dC,
            dD,
            du,
            *map(strides, (dy, a.x, a.C, a.u, du)),
            *sizes(a.x),
            **options,
        )
        grid, _, options = _launch(wide)
        kernels.backward_inputs[grid](dy, a.weight, a.C, wide, *map(strides, (dy, a.C, wide)), *sizes(a.x), **options)
    for axis, size in ((2, h), (3, w)):  # what lies outside was read at the border
        wide.select(axis, 5).add_(wide.narrow(axis, 0, 5).sum(axis))
        wide.select(axis, size + 4).add_(wide.narrow(axis, size + 5, 5).sum(axis))
    grads = {"x": torch.empty_like(a.x).copy_(wide[:, :, 5 : h + 5, 5 : w + 5]), "weight": dweight.sum((0, 1))}
    if a.C is not None:
        grads |= {"C": dC.sum(0).to(a.C.dtype), "D": dD.sum((0, 1)).to(a.D.dtype), "u": du}
    return grads


KERNEL = Kernel(forward, backward)
FUSION = Differentiable(
    "fused_states",
    Inputs,
    like=lambda a: (result(a),),
    gradients=lambda a: {name: torch.empty_like(t) for name, t in zip(a._fields, a) if t is not None},
)
FUSION.kernels["triton"] = KERNEL


def fuse(x: Tensor, kernels, alpha: Tensor, C: Tensor | None = None, D: Tensor | None = None, u: Tensor | None = None):
    return FUSION(Inputs(x, taps(kernels, alpha, torch.float32).flatten(1), C, D, u), "triton")


def why_not(a) -> str | None:
    if a.x.numel() == 0:
        return "is given nothing to do"
    return why_not_float(a.x, *a.kernels, a.alpha)


@state_fusion.register("triton", device=DEVICE, missing=MISSING, unsupported=why_not)
def state_fusion_triton(a) -> Tensor:
    return fuse(a.x, a.kernels, a.alpha)


def variants() -> Iterator[Variant]:
    def call(dtype="bf16", last=True, read=False, sizes=(64, 128, 56, 56)):
        (b, c, h, w), kind = sizes, DTYPES[dtype]
        x = meta(*sizes, dtype=kind, last=1 if last else None)
        more = (meta(b, h, w, dtype=kind), meta(c), meta(*sizes, dtype=kind, last=1)) if read else (None, None, None)
        a = Inputs(x, meta(c, 27), *more)
        return lambda: train(KERNEL, a)

    yield Variant("bf16, channels last, read out, b 64, c 128, 56 x 56", call(read=True), typical=True)
    for dtype in DTYPES:
        yield Variant(f"{dtype}, channels last", call(dtype))
    yield Variant("fp32, channels last, read out", call("fp32", read=True))
    yield Variant("bf16, channels first", call(last=False))
    yield Variant("bf16, 5 channels, 3 x 4", call(sizes=(2, 5, 3, 4)))
