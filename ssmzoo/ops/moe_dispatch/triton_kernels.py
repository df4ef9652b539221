"""Products of consecutive groups of rows with one matrix each, on a GPU; the host does not read where a group ends.

The grid has as many tiles of rows as there can be: every group may begin a tile. A program counts the tiles of the
groups before it; rows from ends[-1] on are a last group, whose product is 0. WIDE: widen before multiplying, for the
interpreter, which cannot multiply bf16.
"""

import triton
import triton.language as tl


@triton.jit
def multiply(
    x,
    weight,
    ends,
    out,
    rows,
    width,
    columns,
    groups,
    x_stride,
    weight_stride,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    G: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    """out_r = x_r W_e. x (rows width), weight (groups width columns), ends (groups) int32, out (rows columns)"""
    blocks = tl.cdiv(columns, N)
    place, c = tl.program_id(0) // blocks, tl.program_id(0) % blocks * N + tl.arange(0, N)
    g = tl.arange(0, G)
    end = tl.minimum(tl.load(ends + g, g < groups, rows), rows)
    start = tl.minimum(tl.load(ends + g - 1, (g > 0) & (g <= groups), 0), rows)
    start = tl.where(g > groups, rows, start)
    tiles = tl.cdiv(end - start, M)
    behind = tl.cumsum(tiles, 0)  # tiles up to and with each group
    group = tl.sum((behind <= place).to(tl.int32), 0)
    mine = g == group
    first = tl.sum(tl.where(mine, start + (place - behind + tiles) * M, 0), 0)
    last = tl.sum(tl.where(mine, end, 0), 0)
    r = first + tl.arange(0, M)
    own, there = (r < last), c < columns
    total = tl.zeros([M, N], tl.float32)
    known = group < groups
    e = tl.where(known, group, 0).to(tl.int64)
    for begin in range(0, tl.where(known, width, 0), K):
        k = (begin + tl.arange(0, K)).to(tl.int64)
        a = tl.load(
            x + r.to(tl.int64)[:, None] * x_stride[0] + k[None, :] * x_stride[1],
            own[:, None] & (k < width)[None, :],
            0.0,
        )
        at = e * weight_stride[0] + k[:, None] * weight_stride[1] + c.to(tl.int64)[None, :] * weight_stride[2]
        w = tl.load(weight + at, (k < width)[:, None] & there[None, :], 0.0)
        if WIDE:
            a, w = a.to(tl.float32), w.to(tl.float32)
        total = tl.dot(a, w.to(a.dtype), total, input_precision=PRECISION)
    at = r.to(tl.int64)[:, None] * columns + c[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), own[:, None] & there[None, :])


@triton.jit
def outer(
    x,
    y,
    ends,
    out,
    rows,
    width,
    columns,
    x_stride,
    y_stride,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    """out_e = sum of x_r y_r^T over the rows of group e; x (rows width), y (rows columns), out (e width columns)"""
    across, down = tl.cdiv(columns, N), tl.cdiv(width, M)
    e, tile = tl.program_id(0) // (across * down), tl.program_id(0) % (across * down)
    i, j = (tile // across * M + tl.arange(0, M)).to(tl.int64), (tile % across * N + tl.arange(0, N)).to(tl.int64)
    last = tl.minimum(tl.load(ends + e), rows)
    first = tl.where(e > 0, tl.minimum(tl.load(ends + e - 1, e > 0, 0), rows), 0)
    total = tl.zeros([M, N], tl.float32)
    for begin in range(first, last, K):
        r = (begin + tl.arange(0, K)).to(tl.int64)
        own = r < last
        a = tl.load(x + i[:, None] * x_stride[1] + r[None, :] * x_stride[0], (i < width)[:, None] & own[None, :], 0.0)
        b = tl.load(y + r[:, None] * y_stride[0] + j[None, :] * y_stride[1], own[:, None] & (j < columns)[None, :], 0.0)
        if WIDE:
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, b.to(a.dtype), total, input_precision=PRECISION)
    at = (e.to(tl.int64) * width + i)[:, None] * columns + j[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), (i < width)[:, None] & (j < columns)[None, :])
