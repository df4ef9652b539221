"""causal_conv1d_fn and causal_conv1d_update on our GPU kernels (triton_kernels.py)."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from ssmzoo.ops.causal_conv1d import causal_conv1d_fn, causal_conv1d_update, empty_gradients, register
from ssmzoo.ops.checks import resets, why_not_float
from ssmzoo.ops.eager import eager, needs_grad
from ssmzoo.ops.library import Kernel, in_place
from ssmzoo.ops.rows import checked
from ssmzoo.ops.triton import DEVICE, MISSING, on_device_of, power_of_2, strides, whole
from ssmzoo.ops.triton.variants import DTYPES, Passes, Variant, meta, train

PASSES = {name: Passes(("C", "T"), most=150) for name in ("forward", "backward_weights", "backward_inputs")}
PASSES["update"] = Passes(("C", "T"), most=200)
TILE, SHORT = 1024, 16  # elements of a tile; its length across the neighbouring elements, at most
UPDATE_TILE = 1024  # elements of the past inputs that a program of the update holds, at most


def _tiles(x, length: int) -> tuple[tuple[int], int, dict]:
    """(grid, tiles along time, options): tiles are long where elements lie next to each other."""
    b, c, _ = x.shape
    long = TILE // SHORT
    C, T = (long, SHORT) if x.stride(1) == 1 and x.stride(2) != 1 else (SHORT, long)
    C, T = min(C, power_of_2(c)), min(T, power_of_2(length))
    tiles = -(-length // T)
    return (b * -(-c // C) * tiles,), tiles, {"C": C, "T": T, "num_warps": 4}


def _segments(seq_idx):
    """The number of resets up to each position, -1 for padding."""
    if seq_idx is None:
        return None
    return resets(seq_idx).cumsum(1, dtype=torch.int32).masked_fill(seq_idx < 0, -1)


def forward(a, save):
    from ssmzoo.ops.causal_conv1d import triton_kernels as kernels

    out, (_, c, l), k = torch.empty_like(a.x), a.x.shape, a.weight.shape[1]
    if out.numel():
        grid, tiles, options = _tiles(a.x, l)
        with on_device_of(a.x):
            kernels.forward[grid](
                a.x,
                whole(a.weight),
                whole(a.bias),
                a.initial_states,
                _segments(a.seq_idx),
                out,
                *map(strides, (a.x, a.initial_states, out)),
                c,
                l,
                tiles,
                SILU=a.activation is not None,
                K=k,
                **options,
            )
    return (out,), None


def backward(a, saved, dout):
    from ssmzoo.ops.causal_conv1d import triton_kernels as kernels

    (b, c, l), k = a.x.shape, a.weight.shape[1]
    grads = empty_gradients(a)
    if a.x.numel() == 0:
        return {name: g.zero_() for name, g in grads.items()}
    grid, tiles, options = _tiles(a.x, l)
    dy = torch.empty_like(a.x, dtype=torch.float32)
    dweight = dy.new_empty(b, tiles, c, k)
    dbias = None if a.bias is None else dy.new_empty(b, tiles, c)
    dx, dfirst = grads["x"], grads.get("initial_states")
    segment, taps = _segments(a.seq_idx), whole(a.weight)
    with on_device_of(a.x):
        kernels.backward_weights[grid](
            dout,
            a.x,
            taps,
            whole(a.bias),
            a.initial_states,
            segment,
            dy,
            dweight,
            dbias,
            *map(strides, (dout, a.x, a.initial_states, dy)),
            c,
            l,
            tiles,
            SILU=a.activation is not None,
            K=k,
            **options,
        )
        grid, tiles, options = _tiles(a.x, l + k - 1)
        kernels.backward_inputs[grid](
            dy, taps, segment, dx, dfirst, *map(strides, (dy, dx, dfirst)), c, l, tiles, K=k, **options
        )
    grads["weight"].copy_(dweight.sum((0, 1)))
    if a.bias is not None:
        grads["bias"].copy_(dbias.sum((0, 1)))
    return grads


def why_not(a) -> str | None:
    return why_not_float(a.x, a.weight, a.bias, a.initial_states)


KERNEL = Kernel(forward, backward)
register("triton", KERNEL, device=DEVICE, missing=MISSING, unsupported=why_not)


def _update(a) -> torch.Tensor:
    from ssmzoo.ops.causal_conv1d import triton_kernels as kernels

    out = torch.empty_like(a.x)
    x, y = (t if t.ndim == 3 else t[..., None] for t in (a.x, out))
    (b, c, l), (held, _, size), rows = x.shape, a.conv_state.shape, a.conv_state_indices
    if rows is not None and rows.is_cpu:
        checked(rows, a.conv_state)
    if not out.numel():
        return out
    S = power_of_2(size)
    C, T = min(power_of_2(c), max(1, UPDATE_TILE // S)), min(SHORT, power_of_2(l))
    with on_device_of(x):
        kernels.update[(-(-c // C) * b,)](
            x,
            a.conv_state,
            a.weight.contiguous(),
            None if a.bias is None else a.bias.contiguous(),
            a.cache_seqlens,
            rows,
            y,
            *map(strides, (x, a.conv_state, y)),
            c,
            l,
            size,
            held,
            SILU=a.activation is not None,
            K=a.weight.shape[1],
            C=C,
            T=T,
            S=S,
            num_warps=4,
        )
    return out


TRACED = in_place("causal_conv1d_update_triton", causal_conv1d_update.Arguments, "conv_state", _update, like="x")


def why_not_update(a) -> str | None:
    given = (a.x, a.conv_state, a.weight, a.bias)
    return "has no backward; the torch backend does" if needs_grad(*given) else why_not_float(*given)


@causal_conv1d_update.register("triton", device=DEVICE, missing=MISSING, unsupported=why_not_update)
def causal_conv1d_update_triton(a) -> torch.Tensor:
    return _update(a) if eager(a.x, a.conv_state) else TRACED(*a)


def variants() -> Iterator[Variant]:
    def call(dtype="bf16", sizes=(8, 2048, 2048), k=4, last=False, silu=True, packs=False):
        (b, c, l), kind = sizes, DTYPES[dtype]
        a = dict(x=meta(b, c, l, dtype=kind, last=1 if last else None), weight=meta(c, k), bias=meta(c))
        a |= dict(activation="silu" if silu else None)
        if packs:
            a |= dict(seq_idx=meta(b, l, dtype=torch.int32), initial_states=meta(b, c, k - 1))
        a = causal_conv1d_fn.Arguments(**a)
        return lambda: train(KERNEL, a)

    yield Variant("bf16, channels last, b 8, c 2048, l 2048, k 4", call(last=True), typical=True)
    yield Variant("bf16", call())
    for dtype in DTYPES:
        yield Variant(f"{dtype}, channels last, packed", call(dtype, last=True, packs=True))
    yield Variant("bf16, packed", call(packs=True))
    yield Variant("fp32", call("fp32"))
    for k in (2, 3):
        yield Variant(f"bf16, k {k}", call(k=k))
    yield Variant("bf16, no activation", call(silu=False))
    yield Variant("bf16, 7 steps", call(sizes=(8, 2048, 7), packs=True))
    for dtype, kind in DTYPES.items():
        a = (meta(8, 2048, dtype=kind), meta(8, 2048, 4, dtype=kind), meta(2048, 4, dtype=kind), meta(2048, dtype=kind))
        a = causal_conv1d_update.Arguments(*a, activation="silu")
        yield Variant(f"{dtype}, a token of 8 sequences", functools.partial(_update, a))
