"""A matrix of small integers times a vector on a GPU: a program takes E rows and one vector."""

import triton
import triton.language as tl


@triton.jit
def _of_group(base, r, column, own, inside, groups, group_size, GROUPED: tl.constexpr):
    """(E W) scales, or numbers that stand for 0, of a group of neighbouring columns; (E 1) where there is one group."""
    if GROUPED:
        at = r[:, None] * groups + (column // group_size)[None, :]
        found = tl.load(base + at, own[:, None] & inside[None, :], 0.0).to(tl.float32)
    else:
        found = tl.load(base + r, own, 0.0).to(tl.float32)[:, None]
    return found


@triton.jit
def _seen(x, column, inside, act_scale):
    """What the product sees of x: itself, or the 8-bit integers that stand for it, halves to even."""
    v = tl.load(x + column, inside, 0.0).to(tl.float32)
    if act_scale is not None:
        v = tl.minimum(tl.maximum(tl.div_rn(v, act_scale), -128.0), 127.0)
        v = (v + 12582912.0) - 12582912.0  # 1.5 * 2^23: what is added has no room for fractions
    return v


@triton.jit
def multiply(
    x,
    weight,
    scale,
    zero,
    bias,
    act_scale,
    out,
    rows,
    width,
    groups,
    group_size,
    least,
    DYNAMIC: tl.constexpr,
    NIBBLES: tl.constexpr,
    GROUPED: tl.constexpr,
    E: tl.constexpr,
    W: tl.constexpr,
):
    """out (b rows) = sum of x (b width) (q - zero) scale + bias, q (rows width) int8, or two columns to a byte.

    act_scale: None, a number in memory, or, DYNAMIC, max|x| / 127 of the vector, at least `least`."""
    b = tl.program_id(1).to(tl.int64)
    r = tl.program_id(0).to(tl.int64) * E + tl.arange(0, E)
    own, columns = r < rows, tl.arange(0, W)
    x += b * width
    step = None
    if DYNAMIC:
        most = tl.zeros([W], tl.float32)
        for start in range(0, width, W):
            most = tl.maximum(most, tl.abs(tl.load(x + start + columns, start + columns < width, 0.0).to(tl.float32)))
        step = tl.maximum(tl.div_rn(tl.max(most, 0), 127.0), least)
    elif act_scale is not None:
        step = tl.load(act_scale).to(tl.float32)
    total = tl.zeros([E, W], tl.float32)
    row_bytes = width // 2 if NIBBLES else width
    for start in range(0, row_bytes, W):
        c = start + columns
        inside = c < row_bytes
        q = tl.load(weight + r[:, None] * row_bytes + c[None, :], own[:, None] & inside[None, :], 0)
        for half in tl.static_range(2 if NIBBLES else 1):
            column, codes = c, q
            if NIBBLES:
                column, codes = 2 * c + half, ((q.to(tl.int32) >> (4 * half)) & 15) - 8
            codes = codes.to(tl.float32)
            if zero is not None:
                codes -= _of_group(zero, r, column, own, inside, groups, group_size, GROUPED)
            value = codes * _seen(x, column, inside, step)[None, :]
            if GROUPED:
                value *= _of_group(scale, r, column, own, inside, groups, group_size, GROUPED)
            total += value
    y = tl.sum(total, 1)
    if not GROUPED:
        y *= tl.load(scale + r, own, 0.0).to(tl.float32)
    if step is not None:
        y *= step
    if bias is not None:
        y += tl.load(bias + r, own, 0.0).to(tl.float32)
    tl.store(out + b * rows + r, y.to(out.dtype.element_ty), own)
