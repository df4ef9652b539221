"""h_t = a_t h_{t-1} + b_t of complex numbers on a GPU: a program walks C channels of one sequence in tiles of T steps,
each a scan. Real and imaginary parts lie next to each other and are read together.

Backwards the gradient of b is the same walk the other way with the conjugates of the transitions of the steps after.
"""

import triton
import triton.language as tl


@triton.jit
def _times(a, b, c, d):
    """(a + i b) (c + i d)"""
    return a * c - b * d, a * d + b * c


@triton.jit
def _chain(a, ai, x, xi, b, bi, y, yi):
    """h -> a h + x, then h -> b h + y, as one such map; behind every real part its imaginary one."""
    product, producti = _times(b, bi, a, ai)
    moved, movedi = _times(b, bi, x, xi)
    return product, producti, moved + y, movedi + yi


@triton.jit
def _place(channels, C: tl.constexpr):
    """(sequence, channels (1 C), whether they exist)"""
    blocks = tl.cdiv(channels, C)
    c = tl.program_id(0) % blocks * C + tl.arange(0, C)[None, :]
    return (tl.program_id(0) // blocks).to(tl.int64), c.to(tl.int64), c < channels


@triton.jit
def _tile(base, at, mask):
    """Real and imaginary parts (T C) at these places, counted in complex numbers; 0 outside the mask."""
    return tl.split(tl.load(base + 2 * at[:, :, None] + tl.arange(0, 2)[None, None, :], mask[:, :, None], 0.0))


@triton.jit
def _store(base, at, real, imaginary, mask):
    tl.store(base + 2 * at[:, :, None] + tl.arange(0, 2)[None, None, :], tl.join(real, imaginary), mask[:, :, None])


@triton.jit
def _of_row(x, xi, row, which):
    """(1 C): that row of a tile of complex numbers."""
    return tl.sum(tl.where(row == which, x, 0.0), 0)[None, :], tl.sum(tl.where(row == which, xi, 0.0), 0)[None, :]


@triton.jit
def forward(
    a, b, first, h, a_stride, b_stride, h_stride, length, channels, tiles, T: tl.constexpr, C: tl.constexpr
):  # fmt: skip
    i, c, own = _place(channels, C)
    row = tl.arange(0, T)[:, None]
    before = tl.zeros([1, C], tl.float32)
    beforei = before
    if first is not None:
        before, beforei = _tile(first, i * channels + c, own)
    for tile in range(tiles):
        t = tile * T + row + 0 * i
        mask = (t < length) & own
        decay, decayi = _tile(a, i * a_stride[0] + t * a_stride[1] + c * a_stride[2], mask)
        x, xi = _tile(b, i * b_stride[0] + t * b_stride[1] + c * b_stride[2], mask)
        product, producti, x, xi = tl.associative_scan((decay, decayi, x, xi), 0, _chain)
        product, producti = _times(product, producti, before, beforei)
        x += product
        xi += producti
        _store(h, i * h_stride[0] + t * h_stride[1] + c * h_stride[2], x, xi, mask)
        before, beforei = _of_row(x, xi, row, T - 1)


@triton.jit
def backward(
    a, first, h, dh, da, db, a_stride, h_stride, dh_stride, length, channels, tiles, T: tl.constexpr, C: tl.constexpr
):  # fmt: skip
    """da and db as h."""
    i, c, own = _place(channels, C)
    row = tl.arange(0, T)[:, None]
    after = tl.zeros([1, C], tl.float32)
    afteri = after
    for tile in range(tiles):
        t = (tiles - 1 - tile) * T + row + 0 * i
        mask = (t < length) & own
        decay, decayi = _tile(a, i * a_stride[0] + (t + 1) * a_stride[1] + c * a_stride[2], (t + 1 < length) & own)
        g, gi = _tile(dh, i * dh_stride[0] + t * dh_stride[1] + c * dh_stride[2], mask)
        product, producti, g, gi = tl.associative_scan((decay, -decayi, g, gi), 0, _chain, reverse=True)
        product, producti = _times(product, producti, after, afteri)
        g += product
        gi += producti
        at = i * h_stride[0] + t * h_stride[1] + c * h_stride[2]
        past, pasti = _tile(h, at - h_stride[1], mask & (t > 0))
        if first is not None:
            start, starti = _tile(first, i * channels + c + 0 * row, mask & (t == 0))
            past += start
            pasti += starti
        _store(db, at, g, gi, mask)
        past, pasti = _times(g, gi, past, -pasti)
        _store(da, at, past, pasti, mask)
        after, afteri = _of_row(g, gi, row, 0)
