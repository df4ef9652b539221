"""causal_conv1d_fn on our GPU kernels (causal_conv1d_kernels.py). One token at a time is left to the torch form: it
moves a few kilobytes."""

from __future__ import annotations

import torch

from ssmzoo.ops.causal_conv1d import causal_conv1d_fn, last_inputs
from ssmzoo.ops.causal_conv1d_op import KERNELS, ConvKernel, empty_gradients
from ssmzoo.ops.checks import resets
from ssmzoo.ops.triton import DEVICE, MISSING, on_device_of, power_of_2, strides, whole, why_not_float

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


def forward(x, weight, bias, seq_idx, initial_states, silu):
    from ssmzoo.ops.triton import causal_conv1d_kernels as kernels

    out, (_, c, l), k = torch.empty_like(x), x.shape, weight.shape[1]
    if out.numel():
        grid, tiles, options = _tiles(x, l)
        with on_device_of(x):
            kernels.forward[grid](
                x,
                whole(weight),
                whole(bias),
                initial_states,
                _segments(seq_idx),
                out,
                *map(strides, (x, initial_states, out)),
                c,
                l,
                tiles,
                SILU=silu,
                K=k,
                **options,
            )
    return out


def backward(dout, x, weight, bias, seq_idx, initial_states, silu):
    from ssmzoo.ops.triton import causal_conv1d_kernels as kernels

    (b, c, l), k = x.shape, weight.shape[1]
    grads = empty_gradients(x, weight, bias, initial_states)
    if x.numel() == 0:
        return tuple(g.zero_() for g in grads)
    grid, tiles, options = _tiles(x, l)
    dy = torch.empty_like(x, dtype=torch.float32)
    dweight = dy.new_empty(b, tiles, c, k)
    dbias = None if bias is None else dy.new_empty(b, tiles, c)
    dfirst = None if initial_states is None else grads[3]
    segment, taps = _segments(seq_idx), whole(weight)
    with on_device_of(x):
        kernels.backward_weights[grid](
            dout,
            x,
            taps,
            whole(bias),
            initial_states,
            segment,
            dy,
            dweight,
            dbias,
            *map(strides, (dout, x, initial_states, dy)),
            c,
            l,
            tiles,
            SILU=silu,
            K=k,
            **options,
        )
        grid, tiles, options = _tiles(x, l + k - 1)
        kernels.backward_inputs[grid](
            dy, taps, segment, grads[0], dfirst, *map(strides, (dy, grads[0], dfirst)), c, l, tiles, K=k, **options
        )
    grads[1].copy_(dweight.sum((0, 1)))
    if bias is not None:
        grads[2].copy_(dbias.sum((0, 1)))
    return tuple(grads)


def why_not(
    x,
    weight,
    bias=None,
    seq_idx=None,
    initial_states=None,
    return_final_states=False,
    final_states_out=None,
    activation=None,
) -> str | None:
    return why_not_float(x, weight, bias, initial_states)


KERNELS["triton"] = ConvKernel(forward, backward)


@causal_conv1d_fn.register("triton", device=DEVICE, missing=MISSING, unsupported=why_not)
def _causal_conv1d_triton(
    x,
    weight,
    bias=None,
    seq_idx=None,
    initial_states=None,
    return_final_states=False,
    final_states_out=None,
    activation=None,
):
    out = torch.ops.ssmzoo.causal_conv1d_with(
        x, weight, bias, seq_idx, initial_states, activation is not None, "triton"
    )
    if not return_final_states:
        return out
    states = last_inputs(x, seq_idx, initial_states, weight.shape[1] - 1)
    return out, states if final_states_out is None else final_states_out.copy_(states)
