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
from ssmzoo.ops.triton import ALL_REGISTERS, DEVICE, INTERPRETED, MISSING, on_device_of, power_of_2, strides, whole
from ssmzoo.ops.triton.variants import DTYPES, Passes, Variant, meta, train

LOOPS = ("Q", "P"), ("stretches", "stretch_chunks")
PASSES = {
    "forward": Passes(*LOOPS, most=250),
    "backward": Passes(*LOOPS, most=600),
    "pairs": Passes(("Q", "P"), most=150),
}
STRETCH = 128  # positions between saved states
CHUNK = 16  # positions per chunk: divides STRETCH, at least 16; 32 spill registers
WIDEST = 128  # states per channel, at most: 256 spill registers
STATE_SIZE = 2048  # numbers of the forward's state, which are in registers; 4096 of more than 64 states per channel
FORWARD = {"num_warps": 4} | ALL_REGISTERS
# channels of a program at most, states that it multiplies at once
BACKWARD = {"P": 32, "K": 16, "num_warps": 4} | ALL_REGISTERS
PAIRS = {"P": 64, "K": 32, "num_warps": 2}


def saved(a: Recurrence) -> Tensor:
    b, l, h, p = a.x.shape
    return a.x.new_empty(-(-l // STRETCH), b, h, p, a.B.shape[3], dtype=torch.float32)


def _launch(x: Tensor, B: Tensor, ranks: int, P: int, **more: int) -> tuple[int, tuple, dict]:
    """(blocks per head, sizes, options) where a program takes P channels at most"""
    (_, l, h, p), (g, n) = x.shape, B.shape[2:]
    P = max(16, min(P, power_of_2(p)))
    precision = "ieee" if torch.version.hip else "tf32"
    return (
        -(-p // P),
        (l, h, h // g, p, n),
        {"PRECISION": precision, "RANKS": ranks, "Q": CHUNK, "P": P, **more, "num_stages": 1},
    )


def _segments(seq_idx: Tensor | None) -> Tensor | None:
    return None if seq_idx is None else resets(seq_idx).cumsum(1, dtype=torch.int32)


def _along(t: Tensor | None) -> Tensor | None:
    """(b l h) as the kernels read it: (b h l), so that a chunk's positions lie next to each other."""
    return None if t is None else whole(t.mT)


def _stretches(a: Recurrence) -> tuple[int, int, int]:
    """(stretches, chunks of one, numbers of all states at once)"""
    (b, l, h, p), n = a.x.shape, a.B.shape[3]
    return -(-l // STRETCH), STRETCH // CHUNK, b * h * p * n


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
    N = max(16, power_of_2(n))
    blocks, sizes, options = _launch(a.x, a.B, ranks, max(32, min(64, STATE_SIZE // N)), N=N, **FORWARD)
    with on_device_of(a.x):
        kernels.forward[(b * h * blocks,)](
            a.x,
            _along(a.dt),
            _along(a.log_decay),
            a.B,
            a.C,
            whole(a.D),
            _along(diagonal),
            whole(a.initial_states),
            _segments(a.seq_idx),
            y,
            last,
            states,
            *map(strides, (a.x, a.B, a.C, y)),
            *sizes,
            *_stretches(a),
            SAVE=save,
            **options,
        )
    return (y, last), states


def backward(a: Recurrence, states, dy, dlast, diagonal: Tensor | None = None, ranks: int = 1):
    from ssmzoo.ops.ssd import triton_kernels as kernels

    (b, l, h, p), (g, n) = a.x.shape, a.B.shape[2:]
    a, dy = a._replace(x=_near(a.x), B=_near(a.B), C=_near(a.C)), _near(dy)
    unaligned = {"P": 16} if n % 16 else {}  # every number of a state then has an address of its own
    blocks, sizes, options = _launch(a.x, a.B, ranks, **BACKWARD | unaligned)
    new = functools.partial(a.x.new_empty, dtype=torch.float32)
    scratch, through = new(STRETCH // CHUNK + 1, b, h, p, n), new(b, l, h, p)
    shares = {  # of the blocks and, last, of what stays within chunks
        "dt": None if a.dt is None else new(blocks + 1, b, h, l),
        "log_decay": new(blocks + 1, b, h, l),
        "B": new(blocks + 1, b, l, g, h // g, n),
        "C": new(blocks + 1, b, l, g, h // g, n),
    }
    grads = {
        "x": a.x.new_empty(a.x.shape),
        "D": None if a.D is None else new(b, h, p),
        "initial_states": None if a.initial_states is None else new(b, h, p, n),
        "diagonal": None if diagonal is None else new(b, h, l),
    }
    given = a.x, _along(a.dt), _along(a.log_decay), a.B, a.C, whole(a.D)
    segments, all_strides = _segments(a.seq_idx), [*map(strides, (a.x, a.B, a.C, dy))]
    with on_device_of(a.x):
        kernels.backward[(b * h * blocks,)](
            *given,
            segments,
            states,
            dy,
            whole(dlast),
            scratch,
            through,
            *(None if t is None else t[:blocks] for t in shares.values()),
            grads["D"],
            grads["initial_states"],
            *all_strides,
            *sizes,
            *_stretches(a),
            b * l * h,
            b * l * h * n,
            **options,
        )
        kernels.pairs[(b * h * -(-l // CHUNK),)](
            *given,
            _along(diagonal),
            segments,
            dy,
            through,
            grads["x"],
            *(None if t is None else t[blocks] for t in shares.values()),
            grads["diagonal"],
            *all_strides,
            *sizes,
            -(-l // CHUNK),
            **_launch(a.x, a.B, ranks, **PAIRS)[2],
        )
    sums = {name: t.sum((0, 4) if t.ndim == 6 else 0) for name, t in shares.items() if t is not None}
    grads = sums | {name: t.sum(0) if name == "D" else t for name, t in grads.items() if t is not None}
    for name in grads.keys() & {"dt", "log_decay", "diagonal"}:
        grads[name] = grads[name].mT
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
