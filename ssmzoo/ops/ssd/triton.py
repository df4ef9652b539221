"""ssd_scan and mamba_chunk_scan_combined on our GPU kernels (triton_kernels.py).

PyTorch's form spends its time not in matrix products but in moving decays, (b h l q) numbers in fp32 that pass through
memory some ten times; here they never leave the chip. Products are taken in TF32, whose 10 bits are no fewer than those
of 16-bit inputs. For fp32 inputs that would be too few, and products of full precision do not fit into the registers
(compiled for sm_90, 6 to 8 kB of them spill per thread), so that these are left to PyTorch.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from ssmzoo.ops.checks import resets, why_not_float
from ssmzoo.ops.library import Kernel
from ssmzoo.ops.ssd import Recurrence, register
from ssmzoo.ops.triton import DEVICE, INTERPRETED, MISSING, on_device_of, power_of_2, strides, whole
from ssmzoo.ops.triton.variants import DTYPES, Passes, Variant, meta, train

LOOPS = ("Q", "P"), ("stretches", "stretch_chunks")
PASSES = {"forward": Passes(*LOOPS, most=250), "backward": Passes(*LOOPS, most=2200)}
STRETCH = 128  # positions between saved states
CHUNK = 16  # positions per chunk: divides STRETCH, at least 16; 32 spill registers
PIECE = 32  # states that the backward multiplies at once
WIDEST = 128  # states per channel, at most: 256 spill registers
STATE_SIZE, WARPS = (4096, 2048), (4, 4)  # numbers of a program's state at most, forward and backward, and its warps


def saved(a: Recurrence) -> Tensor:
    b, l, h, p = a.x.shape
    return a.x.new_empty(-(-l // STRETCH), b, h, p, a.B.shape[3], dtype=torch.float32)


def _launch(x: Tensor, B: Tensor, back: bool) -> tuple[tuple[int], int, tuple, dict]:
    """(grid, blocks per head, sizes, options)"""
    (b, l, h, p), (g, n) = x.shape, B.shape[2:]
    N = max(16, power_of_2(n))
    P = max(16, min(64, power_of_2(p), STATE_SIZE[back] // N))
    blocks = -(-p // P)
    options = {
        "PRECISION": "ieee" if torch.version.hip else "tf32",
        "Q": CHUNK,
        "P": P,
        "N": N,
        "num_warps": WARPS[back],
        "num_stages": 1,
    }
    return (b * h * blocks,), blocks, (l, h, h // g, p, n, -(-l // STRETCH), STRETCH // CHUNK, b * h * p * n), options


def _segments(seq_idx: Tensor | None) -> Tensor | None:
    return None if seq_idx is None else resets(seq_idx).cumsum(1, dtype=torch.int32)


def _near(t: Tensor) -> Tensor:
    """The same numbers; positions of a chunk lie within 2^30 elements."""
    return t if CHUNK * t.stride(1) + WIDEST * t.stride(3) < 1 << 30 else t.contiguous()


def forward(a: Recurrence, save: bool, diagonal: Tensor | None = None, ranks: int = 1):
    """With `diagonal` (b l h), the weights of a token's positions, `ranks` each, among themselves, y is in fp32."""
    from ssmzoo.ops.ssd import triton_kernels as kernels

    (b, _, h, p), n = a.x.shape, a.B.shape[3]
    a = a._replace(x=_near(a.x), B=_near(a.B), C=_near(a.C))
    y = a.x.new_empty(a.x.shape, dtype=a.x.dtype if diagonal is None else torch.float32)
    last = a.x.new_empty(b, h, p, n, dtype=torch.float32)
    states = saved(a) if save else None
    grid, _, sizes, options = _launch(a.x, a.B, False)
    with on_device_of(a.x):
        kernels.forward[grid](
            a.x,
            whole(a.dt),
            whole(a.log_decay),
            a.B,
            a.C,
            whole(a.D),
            whole(diagonal),
            whole(a.initial_states),
            _segments(a.seq_idx),
            y,
            last,
            states,
            *map(strides, (a.x, a.B, a.C, y)),
            *sizes,
            SAVE=save,
            RANKS=ranks,
            **options,
        )
    return (y, last), states


def backward(a: Recurrence, states, dy, dlast, diagonal: Tensor | None = None, ranks: int = 1, **more: int):
    """more: num_warps and K, where they differ"""
    from ssmzoo.ops.ssd import triton_kernels as kernels

    (b, l, h, p), (g, n) = a.x.shape, a.B.shape[2:]
    a, dy = a._replace(x=_near(a.x), B=_near(a.B), C=_near(a.C)), _near(dy)
    grid, blocks, sizes, options = _launch(a.x, a.B, True)
    new = functools.partial(a.x.new_empty, dtype=torch.float32)
    scratch = new(STRETCH // CHUNK + 1, b, h, p, n)
    unfinished = {
        "x": a.x.new_empty(a.x.shape),
        "dt": None if a.dt is None else new(blocks, b, l, h),
        "log_decay": new(blocks, b, l, h),
        "B": new(blocks, b, l, g, h // g, n),
        "C": new(blocks, b, l, g, h // g, n),
        "D": None if a.D is None else new(b, h, p),
        "diagonal": None if diagonal is None else new(blocks, b, l, h),
        "initial_states": None if a.initial_states is None else new(b, h, p, n),
    }
    with on_device_of(a.x):
        kernels.backward[grid](
            a.x,
            whole(a.dt),
            whole(a.log_decay),
            a.B,
            a.C,
            whole(a.D),
            whole(diagonal),
            _segments(a.seq_idx),
            states,
            dy,
            whole(dlast),
            scratch,
            *unfinished.values(),
            *map(strides, (a.x, a.B, a.C, dy)),
            *sizes,
            b * l * h,
            b * l * h * n,
            RANKS=ranks,
            **({"K": min(options.pop("N"), PIECE)} | options | more),
        )
    parts = {
        "dt": 0,
        "log_decay": 0,
        "B": (0, 4),
        "C": (0, 4),
        "D": 0,
        "diagonal": 0,
    }  # axes of the programs' unfinished sums
    grads = {name: t.sum(parts[name]) if name in parts else t for name, t in unfinished.items() if t is not None}
    return {name: grad.to(getattr(a, name, diagonal).dtype) for name, grad in grads.items()}


def why_not(x: Tensor, B: Tensor, *others: Tensor | None) -> str | None:
    if x.numel() == 0 or B.shape[3] == 0:
        return "is given nothing to do"
    if B.shape[3] > WIDEST:
        return f"holds up to {WIDEST} states per channel on the chip, got {B.shape[3]}"
    if not INTERPRETED and torch.float32 in (x.dtype, B.dtype):
        return "multiplies 16-bit inputs only; the torch form is exact for float32"
    return why_not_float(x, B, *others)


KERNEL = Kernel(forward, backward, saved)
register("triton", KERNEL, why_not, device=DEVICE, missing=MISSING)


def variants() -> Iterator[Variant]:
    def call(dtype="bf16", sizes=(8, 2048, 64, 64), n=128, groups=1, more=True, packs=False):
        (b, l, h, p), kind = sizes, DTYPES[dtype]
        x, B, C = (meta(*shape, dtype=kind) for shape in ((b, l, h, p), (b, l, groups, n), (b, l, groups, n)))
        first, seq_idx = (meta(b, h, p, n), meta(b, l, dtype=torch.int32)) if packs else (None, None)
        dt, D = (meta(b, l, h), meta(h, p)) if more else (None, None)
        a = Recurrence(x, dt, meta(b, l, h), B, C, D, first, seq_idx)
        return lambda: train(KERNEL, a)

    yield Variant("bf16, b 8, l 2048, h 64, p 64, n 128", call(), typical=True)
    for dtype in ("bf16", "fp16"):
        yield Variant(f"{dtype}, packed", call(dtype, packs=True))
    for n in (16, 32, 64):
        yield Variant(f"bf16, n {n}, packed", call(n=n, packs=True))
    yield Variant("bf16, p 20, n 5, nothing optional", call(sizes=(2, 100, 4, 20), n=5, more=False))
