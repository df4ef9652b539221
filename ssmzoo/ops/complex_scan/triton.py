"""complex_scan on our GPU kernels (triton_kernels.py): one pass over memory each way."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ssmzoo.ops.complex_scan import SCAN, complex_scan, of_pairs
from ssmzoo.ops.library import Kernel
from ssmzoo.ops.triton import DEVICE, MISSING, on_device_of, power_of_2, whole
from ssmzoo.ops.triton.variants import Passes, Variant, meta, train

PASSES = {"forward": Passes(("T", "C"), ("tiles",), most=150), "backward": Passes(("T", "C"), ("tiles",), most=200)}
CHANNELS, STEPS = 32, 32  # of a tile


def _launch(b: Tensor) -> tuple[tuple[int], tuple[int, ...], dict]:
    """(grid, sizes, options)"""
    batch, l, n, _ = b.shape
    C = min(CHANNELS, power_of_2(n))
    return (batch * -(-n // C),), (l, n, -(-l // STEPS)), {"T": STEPS, "C": C, "num_warps": 4}


def _pairs(t: Tensor) -> Tensor:
    """With the two parts of a number next to each other, and an even place in memory."""
    return t if t.stride(-1) == 1 and not any(s % 2 for s in t.stride()[:-1]) else t.contiguous()


def _strides(*tensors: Tensor) -> list[tuple[int, ...]]:
    """In complex numbers."""
    return [tuple(s // 2 for s in t.stride()[:-1]) for t in tensors]


def forward(given, save: bool):
    from ssmzoo.ops.complex_scan import triton_kernels as kernels

    a, b = _pairs(given.a), _pairs(given.b)
    h = b.new_empty(b.shape)
    grid, sizes, options = _launch(b)
    with on_device_of(b):
        kernels.forward[grid](a, b, whole(given.initial_state), h, *_strides(a, b, h), *sizes, **options)
    return (h,), None


def backward(given, h: Tensor, dh: Tensor) -> dict[str, Tensor]:
    from ssmzoo.ops.complex_scan import triton_kernels as kernels

    a, h, dh = _pairs(given.a), h.contiguous(), _pairs(dh)
    da, db = h.new_empty(h.shape), h.new_empty(h.shape)
    grid, sizes, options = _launch(h)
    with on_device_of(h):
        kernels.backward[grid](a, whole(given.initial_state), h, dh, da, db, *_strides(a, h, dh), *sizes, **options)
    found = {"a": da, "b": db}
    if given.initial_state is not None:
        decay, grad = (torch.complex(*t[:, 0].unbind(-1)) for t in (a, db))
        found["initial_state"] = torch.view_as_real(decay.conj() * grad)
    return found


KERNEL = SCAN.kernels["triton"] = Kernel(forward, backward)


def why_not(given) -> str | None:
    if given.b.numel() == 0:
        return "has nothing to do for empty inputs"
    for t in given:
        if t is not None and t.dtype != torch.complex64:
            return f"computes in complex64, got {str(t.dtype).removeprefix('torch.')}"
    return None


@complex_scan.register("triton", device=DEVICE, missing=MISSING, unsupported=why_not)
def complex_scan_triton(given) -> Tensor:
    return of_pairs(given, "triton")


def variants() -> Iterator[Variant]:
    def call(b, l, n, first=False):
        given = SCAN.Inputs(meta(b, l, n, 2), meta(b, l, n, 2), meta(b, n, 2) if first else None)
        return lambda: train(KERNEL, given, kept=0)

    yield Variant("b 64, l 512, n 64", call(64, 512, 64, first=True), typical=True)
    yield Variant("from zeros", call(64, 512, 64))
    yield Variant("n 5", call(3, 100, 5, first=True))
