"""causal_conv1d_fn on our GPU kernels (triton_kernels.py). One token at a time is left to the torch form: it
moves a few kilobytes."""

from __future__ import annotations

import torch

from ssmzoo.ops.causal_conv1d import empty_gradients, register
from ssmzoo.ops.checks import resets, why_not_float
from ssmzoo.ops.library import Kernel
from ssmzoo.ops.triton import DEVICE, MISSING, on_device_of, power_of_2, strides, whole

TILE, SHORT = 1024, 16  # elements of a tile; its length across the neighbouring elements, at most


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


register("triton", Kernel(forward, backward), device=DEVICE, missing=MISSING, unsupported=why_not)
