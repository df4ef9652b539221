"""gated_delta_rule on our GPU kernels (triton_kernels.py): a decay per head or per channel of the key."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from ssmzoo.ops.checks import resets, why_not_float
from ssmzoo.ops.gated_delta_rule import RULE, Inputs, gated_delta_rule
from ssmzoo.ops.library import Kernel
from ssmzoo.ops.triton import ALL_REGISTERS, DEVICE, MISSING, on_device_of, power_of_2, strides, whole
from ssmzoo.ops.triton.variants import DTYPES, Passes, Variant, meta, train

LOOPS = ("N", "P"), ("stretches", "stretch_steps")
PASSES = {"forward": Passes(*LOOPS, most=30), "backward": Passes(*LOOPS, most=60)}
STRETCH, GROUP = 64, 4  # steps between saved states, and between those that the backward writes down
WIDEST = 256  # channels of a key
STATE_SIZE, WARPS = (4096, 8192), (8, 8)  # numbers of a program's state at most, forward and backward, and its warps


def saved(a: Inputs) -> Tensor:
    b, l, h, n = a.q.shape
    return a.q.new_empty(-(-l // STRETCH), b, h, n, a.v.shape[3], dtype=torch.float32)


def _launch(a: Inputs, back: bool) -> tuple[tuple[int], int, tuple, dict]:
    """(grid, blocks per head, sizes, options)"""
    (b, l, h, n), p = a.q.shape, a.v.shape[3]
    N = power_of_2(n)
    P = min(power_of_2(p), max(1, STATE_SIZE[back] // N))
    blocks = -(-p // P)
    options = {"PER_CHANNEL": a.g.ndim == 4, "N": N, "P": P, "num_warps": max(1, min(WARPS[back], N * P // 256))}
    options |= ALL_REGISTERS
    return (b * h * blocks,), blocks, (l, h, n, p, -(-l // STRETCH), STRETCH, b * h * n * p), options


def _flags(seq_idx: Tensor | None) -> Tensor | None:
    return None if seq_idx is None else resets(seq_idx).to(torch.int8)


def forward(a: Inputs, save: bool):
    from ssmzoo.ops.gated_delta_rule import triton_kernels as kernels

    (b, _, h, n), p = a.q.shape, a.v.shape[3]
    y, last = a.v.new_empty(a.v.shape), a.q.new_empty(b, h, n, p, dtype=torch.float32)
    states = saved(a) if save else None
    grid, _, sizes, options = _launch(a, False)
    given = a.q, a.k, a.v, whole(a.g), whole(a.beta), _flags(a.seq_idx), whole(a.initial_state)
    with on_device_of(a.q):
        kernels.forward[grid](*given, y, last, states, *map(strides, given[:3]), *sizes, SAVE=save, **options)
    return (y, last), states


def backward(a: Inputs, states: Tensor, dy: Tensor, dlast: Tensor | None) -> dict[str, Tensor]:
    from ssmzoo.ops.gated_delta_rule import triton_kernels as kernels

    (b, l, h, n), p = a.q.shape, a.v.shape[3]
    grid, blocks, sizes, options = _launch(a, True)
    new = functools.partial(a.q.new_empty, dtype=torch.float32)
    scratch = new(-(-min(STRETCH, l) // GROUP), b, h, n, p), new(b, h, STRETCH, p)
    grads = {
        "q": new(blocks, b, l, h, n),
        "k": new(blocks, b, l, h, n),
        "v": a.v.new_empty(a.v.shape),
        "g": new(blocks, *a.g.shape),
        "beta": new(blocks, b, l, h),
        "initial_state": None if a.initial_state is None else torch.empty_like(states[0]),
    }
    given = a.q, a.k, a.v, whole(a.g), whole(a.beta), _flags(a.seq_idx), states, dy, whole(dlast)
    with on_device_of(a.q):
        kernels.backward[grid](
            *given,
            *scratch,
            *grads.values(),
            *map(strides, (a.q, a.k, a.v, dy)),
            *sizes,
            b * l * h,
            GROUP=GROUP,
            **options,
        )
    parts = ("q", "k", "g", "beta")  # the programs' unfinished sums
    found = {name: t.sum(0) if name in parts else t for name, t in grads.items() if t is not None}
    return {name: grad.to(getattr(a, name).dtype) for name, grad in found.items()}


KERNEL = RULE.kernels["triton"] = Kernel(forward, backward, saved)


def why_not(a) -> str | None:
    if min(a.q.shape) == 0 or a.v.shape[3] == 0:
        return "is given nothing to do"
    if a.q.shape[3] > WIDEST:
        return f"holds keys of up to {WIDEST} channels on the chip, got {a.q.shape[3]}"
    return why_not_float(a.q, a.k, a.v, a.g, a.beta, a.initial_state)


gated_delta_rule.register("triton", device=DEVICE, missing=MISSING, unsupported=why_not)(lambda a: RULE(a, "triton"))


def variants() -> Iterator[Variant]:
    def call(dtype="bf16", sizes=(8, 2048, 16, 128, 128), per_channel=False, more=False):
        (b, l, h, n, p), kind = sizes, DTYPES[dtype]
        q, k, v, beta = (meta(*s, dtype=kind) for s in ((b, l, h, n), (b, l, h, n), (b, l, h, p), (b, l, h)))
        g = meta(b, l, h, n) if per_channel else meta(b, l, h)
        first, seq_idx = (meta(b, h, n, p), meta(b, l, dtype=torch.int32)) if more else (None, None)
        a = Inputs(q, k, v, g, beta, first, seq_idx)
        return lambda: train(KERNEL, a)

    yield Variant("bf16, b 8, l 2048, h 16, n 128, p 128", call(), typical=True)
    yield Variant("bf16, a decay per channel", call(per_channel=True), typical=True)
    for dtype in DTYPES:
        yield Variant(f"{dtype}, packed", call(dtype, more=True))
    yield Variant(
        "bf16, n 256, a decay per channel, packed", call(sizes=(8, 2048, 4, 256, 512), per_channel=True, more=True)
    )
    for n, p in ((64, 128), (16, 16), (3, 5)):
        yield Variant(f"bf16, n {n}, p {p}", call(sizes=(2, 100, 3, n, p)))
