"""taylor_attention on our GPU kernels (triton_kernels.py), which give the sums; torch divides them."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ssmzoo.ops.checks import resets, why_not_float
from ssmzoo.ops.library import Differentiable, Kernel
from ssmzoo.ops.taylor_attention import n_features, taylor_attention
from ssmzoo.ops.triton import DEVICE, INTERPRETED, MISSING, on_device_of, power_of_2, strides
from ssmzoo.ops.triton.variants import DTYPES, Passes, Variant, meta, train

LOOPS = ("Q", "P"), ("stretches", "stretch_chunks", "pieces")
PASSES = {"forward": Passes(*LOOPS, most=400), "backward": Passes(*LOOPS, most=2500)}
STRETCH, CHUNK = 128, (32, 16)  # positions between saved states, and per chunk forward and backward
CHANNELS = 16  # of queries and keys, at most: 64 spill registers
COLUMNS, WARPS = 32, 4  # of a program, and its warps


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    state: Tensor | None
    mask: Tensor | None
    seq_idx: Tensor | None


def empty_results(a: Inputs) -> tuple[Tensor, Tensor]:
    """Uninitialised sums (b l h p+1) and last state (b h n p+1), fp32."""
    b, l, h, p = a.v.shape
    new = functools.partial(a.v.new_empty, dtype=torch.float32)
    return new(b, l, h, p + 1), new(b, h, n_features(a.q.shape[3]), p + 1)


SUMS = Differentiable("taylor_sums", Inputs, ("sums", "last"), saved="saved", like=empty_results, refer="torch")


def saved(a: Inputs) -> Tensor:
    (b, l, h, p), n = a.v.shape, n_features(a.q.shape[3])
    return a.v.new_empty(-(-l // STRETCH), b, h, n, p + 1, dtype=torch.float32)


def _launch(a: Inputs, back: bool) -> tuple[tuple[int], tuple, dict]:
    """(grid, sizes, options)"""
    (b, l, h, p), f = a.v.shape, a.q.shape[3]
    n = n_features(f)
    apart = f % 16 != 0  # every number of a query has an address of its own
    P = max(16, min(16 if apart and back else COLUMNS, power_of_2(p + 1)))
    options = {
        "PRECISION": "ieee" if torch.version.hip else "tf32",
        "Q": 16 if apart else CHUNK[back],
        "F": max(16, power_of_2(f)),
        "P": P,
    }
    options |= {"num_warps": 2 * WARPS if apart and back else WARPS, "num_stages": 1}
    sizes = l, h, f, p, n, -(-l // STRETCH), STRETCH // options["Q"], f + 1, b * h * n * (p + 1)
    return (b * h * -(-(p + 1) // P),), sizes, options


def _segments(seq_idx: Tensor | None) -> Tensor | None:
    return None if seq_idx is None else resets(seq_idx).cumsum(1, dtype=torch.int32)


def _given(a: Inputs) -> tuple:
    q, k, v = (t if max(CHUNK) * t.stride(1) + t.shape[3] * t.stride(3) < 1 << 30 else t.contiguous() for t in a[:3])
    return (q, k, v), None if a.mask is None else a.mask.to(torch.int8), _segments(a.seq_idx)


def forward(a: Inputs, save: bool):
    from ssmzoo.ops.taylor_attention import triton_kernels as kernels

    rows, seen, segments = _given(a)
    (sums, last), states = empty_results(a), saved(a) if save else None
    last = last.zero_() if a.state is None else last.copy_(a.state)  # advanced in place
    grid, sizes, options = _launch(a, False)
    scale = a.q.shape[3] ** -0.25
    with on_device_of(a.q):
        kernels.forward[grid](
            *rows, seen, segments, sums, last, states, *map(strides, rows), *sizes, scale,
            SAVE=save, **options,
        )  # fmt: skip
    return (sums, last), states


def backward(a: Inputs, states: Tensor, dsums: Tensor, dlast: Tensor | None) -> dict[str, Tensor]:
    from ssmzoo.ops.taylor_attention import triton_kernels as kernels

    rows, seen, segments = _given(a)
    b, l, h, f = a.q.shape
    grid, sizes, options = _launch(a, True)
    new = functools.partial(a.v.new_empty, dtype=torch.float32)
    blocks = grid[0] // (b * h)
    scratch = new(STRETCH // CHUNK[1], *states.shape[1:])
    dq, dk, dv = new(blocks, b, l, h, f), new(blocks, b, l, h, f), a.v.new_empty(a.v.shape)
    dstate = torch.zeros_like(states[0]) if dlast is None else torch.empty_like(states[0]).copy_(dlast)
    with on_device_of(a.q):
        kernels.backward[grid](
            *rows, seen, segments, states, dsums.contiguous(), dstate, scratch, dq, dk, dv,
            *map(strides, rows), *sizes, b * l * h * f, f**-0.25, **options,
        )  # fmt: skip
    found = {"q": dq.sum(0), "k": dk.sum(0), "v": dv} | ({} if a.state is None else {"state": dstate})
    return {name: grad.to(getattr(a, name).dtype) for name, grad in found.items()}


KERNEL = SUMS.kernels["triton"] = Kernel(forward, backward, saved)


def why_not(a) -> str | None:
    if a.v.numel() == 0:
        return "is given nothing to do"
    if a.q.shape[3] > CHANNELS:
        return f"holds queries of up to {CHANNELS} channels at once, got {a.q.shape[3]}"
    if not INTERPRETED and a.v.dtype == torch.float32:
        return "multiplies 16-bit values only; the torch form is exact for float32"
    return why_not_float(a.q, a.k, a.v, a.state)


@taylor_attention.register("triton", device=DEVICE, missing=MISSING, unsupported=why_not)
def taylor_attention_triton(a) -> tuple[Tensor, Tensor]:
    sums, last = SUMS(Inputs(*a[:3], a.state, a.mask, a.seq_idx), "triton")
    return (sums[..., :-1] / (sums[..., -1:] + a.eps)).to(a.v.dtype), last


def variants() -> Iterator[Variant]:
    def call(dtype="bf16", sizes=(8, 2048, 16, 16, 64), more=False):
        (b, l, h, f, p), kind = sizes, DTYPES[dtype]
        q, k, v = (meta(b, l, h, w, dtype=kind) for w in (f, f, p))
        state, mask, seq_idx = None, None, None
        if more:
            state, mask = meta(b, h, n_features(f), p + 1), meta(b, l, dtype=torch.bool)
            seq_idx = meta(b, l, dtype=torch.int32)
        a = Inputs(q, k, v, state, mask, seq_idx)
        return lambda: train(KERNEL, a)

    yield Variant("bf16, b 8, l 2048, h 16, f 16, p 64", call(), typical=True)
    for dtype in ("bf16", "fp16"):
        yield Variant(f"{dtype}, packed, padded", call(dtype, more=True))
    yield Variant("bf16, f 5, p 20", call(sizes=(2, 100, 3, 5, 20)))
