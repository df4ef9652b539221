"""h_t = a_t h_{t-1} + x_t on a GPU: a program walks C channels of one sequence in tiles of T steps, each a scan.

Steps are counted the way the walk goes, from the last one with REVERSE. Backwards the gradient of x is the same walk
the other way with the decays of the steps after, g_t = dh_t + a_{t+1} g_{t+1}, and that of a is g_t h_{t-1}.
"""

import triton
import triton.language as tl

from ssmzoo.ops.triton.functions import chain


@triton.jit
def _place(channels, C: tl.constexpr):
    """(sequence, channels (1 C), whether they exist)"""
    blocks = tl.cdiv(channels, C)
    c = tl.program_id(0) % blocks * C + tl.arange(0, C)[None, :]
    return (tl.program_id(0) // blocks).to(tl.int64), c, c < channels


@triton.jit
def _tile(base, stride, b, step, c, mask, length, REVERSE: tl.constexpr):
    """(T C) of a (b l n) tensor, 0 outside the mask."""
    t = step
    if REVERSE:
        t = length - 1 - step
    return tl.load(base + b * stride[0] + t * stride[1] + c * stride[2], mask, 0.0)


@triton.jit
def forward(
    a, x, first, h, a_stride, x_stride, h_stride, length, channels, tiles, REVERSE: tl.constexpr, T: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    b, c, own = _place(channels, C)
    row = tl.arange(0, T)[:, None]
    before = tl.zeros([1, C], tl.float32)
    if first is not None:
        before = tl.load(first + b * channels + c, own, 0.0)
    for i in range(tiles):
        step = i * T + row + 0 * b
        mask = (step < length) & own
        decay = _tile(a, a_stride, b, step, c, mask, length, REVERSE)
        product, h_t = tl.associative_scan((decay, _tile(x, x_stride, b, step, c, mask, length, REVERSE)), 0, chain)
        h_t += product * before
        t = step
        if REVERSE:
            t = length - 1 - step
        tl.store(h + b * h_stride[0] + t * h_stride[1] + c * h_stride[2], h_t, mask)
        before = tl.sum(tl.where(row == T - 1, h_t, 0.0), 0)[None, :]


@triton.jit
def backward(
    a, first, h, dh, da, dx, a_stride, h_stride, dh_stride, length, channels, tiles, REVERSE: tl.constexpr,
    T: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """da and dx as h."""
    b, c, own = _place(channels, C)
    row = tl.arange(0, T)[:, None]
    after = tl.zeros([1, C], tl.float32)
    for i in range(tiles):
        step = (tiles - 1 - i) * T + row + 0 * b
        mask = (step < length) & own
        decay = _tile(a, a_stride, b, step + 1, c, (step + 1 < length) & own, length, REVERSE)
        given = _tile(dh, dh_stride, b, step, c, mask, length, REVERSE)
        product, g = tl.associative_scan((decay, given), 0, chain, reverse=True)
        g += product * after
        past = _tile(h, h_stride, b, step - 1, c, mask & (step > 0), length, REVERSE)
        if first is not None:
            past += tl.load(first + b * channels + c + 0 * row, mask & (step == 0), 0.0)
        t = step
        if REVERSE:
            t = length - 1 - step
        at = b * h_stride[0] + t * h_stride[1] + c * h_stride[2]
        tl.store(dx + at, g, mask)
        tl.store(da + at, g * past, mask)
        after = tl.sum(tl.where(row == 0, g, 0.0), 0)[None, :]
