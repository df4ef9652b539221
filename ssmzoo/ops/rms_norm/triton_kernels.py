"""Root-mean-square norm on a GPU: every program some neighbouring rows, each whole (R D), in fp32.

With a residual stream, x + residual is formed, written and normalised in the same pass.
"""

import triton
import triton.language as tl


@triton.jit
def forward(x, residual, weight, y, stream, x_stride, rows, width, eps, R: tl.constexpr, D: tl.constexpr):
    row, c = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R), tl.arange(0, D)
    mask = (row < rows)[:, None] & (c < width)[None, :]
    at = row[:, None] * width + c[None, :]
    v = tl.load(x + row[:, None] * x_stride + c[None, :], mask, 0.0).to(tl.float32)
    if residual is not None:
        v += tl.load(residual + at, mask, 0.0).to(tl.float32)
        v = v.to(stream.dtype.element_ty)
        tl.store(stream + at, v, mask)
        v = v.to(tl.float32)
    r = 1.0 / tl.sqrt(tl.sum(v * v, 1) / width + eps)
    w = tl.load(weight + c, c < width, 0.0).to(tl.float32)
    tl.store(y + at, (v * r[:, None] * w[None, :]).to(y.dtype.element_ty), mask)


@triton.jit
def backward(
    x,
    weight,
    dy,
    dstream,
    dx,
    dresidual,
    dweight,
    x_stride,
    rows,
    width,
    passes,
    eps,
    R: tl.constexpr,
    D: tl.constexpr,
):
    """Of x, or of the stream when there is a residual: then dstream, unless None, joins in and dx is of both summands.

    dweight (programs width): the sums of each program's R passes rows
    """
    c = tl.arange(0, D)
    total = tl.zeros([D], tl.float32)
    for i in range(passes):
        row = (tl.program_id(0).to(tl.int64) * passes + i) * R + tl.arange(0, R)
        mask = (row < rows)[:, None] & (c < width)[None, :]
        at = (row * width)[:, None]  # in 64 bits; within a row 32 take fewer registers
        v = tl.load(x + (row * x_stride)[:, None] + c[None, :], mask, 0.0).to(tl.float32)
        r = 1.0 / tl.sqrt(tl.sum(v * v, 1) / width + eps)
        v *= r[:, None]
        grad = tl.load(dy + at + c[None, :], mask, 0.0).to(tl.float32)
        total += tl.sum(grad * v, 0)
        grad *= tl.load(weight + c, c < width, 0.0).to(tl.float32)[None, :]  # from the cache: it would spill registers
        out = (grad - v * (tl.sum(grad * v, 1) / width)[:, None]) * r[:, None]
        if dstream is not None:
            out += tl.load(dstream + at + c[None, :], mask, 0.0).to(tl.float32)
        tl.store(dx + at + c[None, :], out.to(dx.dtype.element_ty), mask)
        if dresidual is not None:
            tl.store(dresidual + at + c[None, :], out.to(dresidual.dtype.element_ty), mask)
    tl.store(dweight + tl.program_id(0).to(tl.int64) * width + c, total, c < width)
