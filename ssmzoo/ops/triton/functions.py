"""Small functions that the kernels share, in fp32."""

import triton
import triton.language as tl


@triton.jit
def chain(a1, x1, a2, x2):
    """h -> a1 h + x1, then h -> a2 h + x2, as one such map: what associative_scan needs for h_t = a_t h_{t-1} + x_t."""
    return a1 * a2, a2 * x1 + x2


@triton.jit
def softplus(x):
    """log(1 + exp(x)), exact to rounding also where it is tiny: log1p(e) = 2 artanh(e / (2 + e)) as a series."""
    e = tl.exp(-tl.abs(x))
    s = e / (2.0 + e)  # at most 1/3, so that eight terms are enough
    q = s * s
    p = 1 / 9 + q * (1 / 11 + q * (1 / 13 + q * (1 / 15)))
    p = 1.0 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * p)))
    return tl.maximum(x, 0.0) + 2.0 * s * p


@triton.jit
def silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def silu_slope(x):
    """d silu / dx"""
    sigma = 1.0 / (1.0 + tl.exp(-x))
    return sigma * (1.0 + x * (1.0 - sigma))


@triton.jit
def tile(base, stride, b, c, t, mask):
    """(C T) of a (b c l) tensor in fp32, zeros outside the mask."""
    offsets = b * stride[0] + c[:, None] * stride[1] + t[None, :] * stride[2]
    return tl.load(base + offsets, mask, 0.0).to(tl.float32)


@triton.jit
def store_tile(base, stride, b, c, t, value, mask):
    offsets = b * stride[0] + c[:, None] * stride[1] + t[None, :] * stride[2]
    tl.store(base + offsets, value.to(base.dtype.element_ty), mask)


@triton.jit
def place(heads, width, P: tl.constexpr):
    """Of a program that has P channels of one head of one sequence: (sequence, head, block of the head, channels (P),
    whether they exist (P)); 64-bit numbers."""
    program, blocks = tl.program_id(0), tl.cdiv(width, P)
    p = program % blocks * P + tl.arange(0, P)
    b = (program // (blocks * heads)).to(tl.int64)
    return b, (program // blocks % heads).to(tl.int64), program % blocks, p.to(tl.int64), p < width


@triton.jit
def rows_inside(first, length, Q: tl.constexpr):
    """(Q) which positions of a chunk exist, compared in 32 bits, which take fewer registers."""
    return tl.arange(0, Q) < (length - first).to(tl.int32)


@triton.jit
def rows_of_head(base, stride, b, first, head, columns, inside, existing, Q: tl.constexpr):
    """(Q columns) of a (b l h .) tensor in fp32; offsets within a chunk have 32 bits and take fewer registers."""
    base += b * stride[0] + first * stride[1] + head * stride[2]
    offsets = tl.arange(0, Q)[:, None] * stride[1] + columns[None, :] * stride[3]
    return tl.load(base + offsets, inside[:, None] & existing[None, :], 0.0).to(tl.float32)
