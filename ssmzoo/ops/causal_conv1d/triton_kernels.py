"""The causal depthwise convolution on a GPU: every program one tile of channels and time (C T) of one sequence.

Positions count from the first token; -(k-1) to -1 are the initial states. `segment` (b l) counts the resets so far: no
tap reaches across a change of it, and what comes before the first token has segment 0. Padding has -1 and
outputs of 0.
"""

import triton
import triton.language as tl

from ssmzoo.ops.triton.functions import silu, silu_slope, store_tile, tile


@triton.jit
def _place(channels, tiles, C: tl.constexpr, T: tl.constexpr):
    """(sequence, channels (C), positions (T)) of this program"""
    program, blocks = tl.program_id(0) // tiles, tl.cdiv(channels, C)
    c = program % blocks * C + tl.arange(0, C)
    t = (tl.program_id(0) % tiles).to(tl.int64) * T + tl.arange(0, T)
    return (program // blocks).to(tl.int64), c.to(tl.int64), t


@triton.jit
def _tap(x, x_stride, first, first_stride, segment, b, c, t, p, inside, channels, length, K: tl.constexpr):
    """(C T) of the inputs at positions p as seen from positions t."""
    own = (c < channels)[:, None]
    seen = inside & (p >= 0)
    if segment is not None:
        here = tl.load(segment + b * length + t, inside, 0)
        seen = seen & (here >= 0) & (tl.load(segment + b * length + p, seen, 0) == here)
    value = tile(x, x_stride, b, c, p, own & seen[None, :])
    if first is not None:
        before = inside & (p < 0)
        if segment is not None:
            before = before & (here == 0)
        past = tile(first, first_stride, b, c, p + K - 1, own & before[None, :])
        past = past.to(x.dtype.element_ty).to(tl.float32)  # as the inputs: rounded to their dtype
        value = tl.where(before[None, :], past, value)
    return value


@triton.jit
def _convolve(
    x,
    x_stride,
    weight,
    bias,
    first,
    first_stride,
    segment,
    b,
    c,
    t,
    channels,
    length,
    K: tl.constexpr,
    C: tl.constexpr,
    T: tl.constexpr,
):
    """(C T), before the activation; 0 for padding."""
    own, inside = c < channels, t < length
    y = tl.zeros([C, T], tl.float32)
    for j in range(K):
        tap = _tap(x, x_stride, first, first_stride, segment, b, c, t, t - (K - 1) + j, inside, channels, length, K)
        y += tap * tl.load(weight + c * K + j, own, 0.0)[:, None]
    if bias is not None:
        y += tl.load(bias + c, own, 0.0)[:, None]
    if segment is not None:
        y = tl.where((tl.load(segment + b * length + t, inside, 0) >= 0)[None, :], y, 0.0)
    return y


@triton.jit
def forward(
    x,
    weight,
    bias,
    first,
    segment,
    out,
    x_stride,
    first_stride,
    out_stride,
    channels,
    length,
    tiles,
    SILU: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    T: tl.constexpr,
):
    b, c, t = _place(channels, tiles, C, T)
    y = _convolve(x, x_stride, weight, bias, first, first_stride, segment, b, c, t, channels, length, K, C, T)
    if SILU:
        y = silu(y)
    store_tile(out, out_stride, b, c, t, y, (c < channels)[:, None] & (t < length)[None, :])


@triton.jit
def backward_weights(
    dout,
    x,
    weight,
    bias,
    first,
    segment,
    dy,
    dweight,
    dbias,
    dout_stride,
    x_stride,
    first_stride,
    dy_stride,
    channels,
    length,
    tiles,
    SILU: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    T: tl.constexpr,
):
    """dy, the gradient before the activation, and sums for dweight (b tile c k), dbias (b tile c)."""
    b, c, t = _place(channels, tiles, C, T)
    own, inside = c < channels, t < length
    mask = own[:, None] & inside[None, :]
    read = mask
    if segment is not None:
        read = mask & (tl.load(segment + b * length + t, inside, 0) >= 0)[None, :]
    grad = tile(dout, dout_stride, b, c, t, read)
    if SILU:
        y = _convolve(x, x_stride, weight, bias, first, first_stride, segment, b, c, t, channels, length, K, C, T)
        grad = grad * silu_slope(y)
    store_tile(dy, dy_stride, b, c, t, grad, mask)
    sums = (b * tiles + tl.program_id(0) % tiles) * channels + c
    for j in range(K):
        tap = _tap(x, x_stride, first, first_stride, segment, b, c, t, t - (K - 1) + j, inside, channels, length, K)
        tl.store(dweight + sums * K + j, tl.sum(grad * tap, 1), own)
    if dbias is not None:
        tl.store(dbias + sums, tl.sum(grad, 1), own)


@triton.jit
def backward_inputs(
    dy,
    weight,
    segment,
    dx,
    dfirst,
    dy_stride,
    dx_stride,
    dfirst_stride,
    channels,
    length,
    tiles,
    K: tl.constexpr,
    C: tl.constexpr,
    T: tl.constexpr,
):
    """dx and, for the positions before the first token, dfirst: each input gathers from the k outputs that saw it."""
    b, c, p = _place(channels, tiles, C, T)
    p -= K - 1
    own, known = c < channels, (p >= 0) & (p < length)
    if segment is not None:
        here = tl.load(segment + b * length + p, known, 0)
    total = tl.zeros([C, T], tl.float32)
    for j in range(K):
        t = p + (K - 1) - j
        seen = (t >= 0) & (t < length) & (p < length)
        if segment is not None:
            seen = seen & (tl.load(segment + b * length + t, seen, 0) == here)
        grad = tile(dy, dy_stride, b, c, t, own[:, None] & seen[None, :])
        total += grad * tl.load(weight + c * K + j, own, 0.0)[:, None]
    store_tile(dx, dx_stride, b, c, p, total, own[:, None] & known[None, :])
    if dfirst is not None:
        store_tile(dfirst, dfirst_stride, b, c, p + K - 1, total, own[:, None] & (p < 0)[None, :])


@triton.jit
def update(
    x,
    state,
    weight,
    bias,
    seen,
    rows,
    out,
    x_stride,
    state_stride,
    out_stride,
    channels,
    length,
    size,
    held,
    SILU: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    T: tl.constexpr,
    S: tl.constexpr,
):
    """The next tokens, in place on the state (row c s): shifted by their number, or, with `seen` (b), circular.

    held is how many rows the states have: a sequence of a row beyond gets NaN and touches nothing.
    """
    blocks, program = tl.cdiv(channels, C), tl.program_id(0).to(tl.int64)
    c, b = program % blocks * C + tl.arange(0, C), program // blocks
    own = c < channels
    row = tl.zeros([1], tl.int64) + b
    if rows is not None:
        row = tl.load(rows + row).to(tl.int64)
    there = (row >= 0) & (row < held)
    first = tl.zeros([1], tl.int64)
    if seen is not None:
        first += tl.load(seen + b).to(tl.int64)
    for start in range(0, length, T):
        t = start + tl.arange(0, T).to(tl.int64)
        y = tl.zeros([C, T], tl.float32)
        for j in range(K):
            p = t - (K - 1) + j
            new = tile(x, x_stride, b, c, p, own[:, None] & ((p >= 0) & (t < length))[None, :])
            if seen is None:
                slot = size + p
            else:
                slot = (first + p + size) % tl.maximum(size, 1)  # p >= -(K-1) >= -size
            past = tile(state, state_stride, row, c, slot, own[:, None] & ((p < 0) & there)[None, :])
            past = past.to(x.dtype.element_ty).to(tl.float32)  # as the inputs: rounded to their dtype
            tap = tl.load(weight + c * K + j, own, 0.0).to(tl.float32)
            y += tl.where((p < 0)[None, :], past, new) * tap[:, None]
        if bias is not None:
            y += tl.load(bias + c, own, 0.0).to(tl.float32)[:, None]
        if SILU:
            y = silu(y)
        if rows is not None:
            y = tl.where(row < 0, 0.0, tl.where(row < held, y, float("nan")))
        store_tile(out, out_stride, b, c, t, y, own[:, None] & (t < length)[None, :])
    s = tl.arange(0, S).to(tl.int64)
    if seen is None:
        p = s + length - size  # the input that slot s holds afterwards
        slot = s
    else:
        kept = tl.minimum(length, size)
        p = tl.where(s < kept, length - kept + s, length)
        slot = (first + p) % tl.maximum(size, 1)
    new = tile(x, x_stride, b, c, p, own[:, None] & ((p >= 0) & (p < length))[None, :])
    written = own[:, None] & ((s < size) & (p < length) & there)[None, :]
    if seen is None:
        past = tile(state, state_stride, row, c, s + length, own[:, None] & ((s + length < size) & there)[None, :])
        past = past.to(x.dtype.element_ty).to(tl.float32)
        new = tl.where((p >= 0)[None, :], new, past)
    tl.debug_barrier()  # everything is read before anything is overwritten
    store_tile(state, state_stride, row, c, slot, new, written)
