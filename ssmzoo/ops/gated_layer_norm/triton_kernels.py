"""Gated layer norm on a GPU: every program some neighbouring rows, each whole (R D), in fp32."""

import triton
import triton.language as tl

from ssmzoo.ops.triton.functions import silu, silu_slope


@triton.jit
def _normal(x, x_stride, row, c, mask, width, eps):
    """(R D) of x, centred and scaled, and the scale (R)."""
    v = tl.load(x + row[:, None] * x_stride + c[None, :], mask, 0.0).to(tl.float32)
    v = tl.where(mask, v - (tl.sum(v, 1) / width)[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(v * v, 1) / width + eps)
    return v * scale[:, None], scale


@triton.jit
def forward(x, z, weight, bias, y, x_stride, z_stride, rows, width, eps, R: tl.constexpr, D: tl.constexpr):
    row, c = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R), tl.arange(0, D)
    mask = (row < rows)[:, None] & (c < width)[None, :]
    normal, _ = _normal(x, x_stride, row, c, mask, width, eps)
    gate = tl.load(z + row[:, None] * z_stride + c[None, :], mask, 0.0).to(tl.float32)
    w = tl.load(weight + c, c < width, 0.0).to(tl.float32)
    b = tl.load(bias + c, c < width, 0.0).to(tl.float32)
    value = (normal * w[None, :] + b[None, :]) * silu(gate)
    tl.store(y + row[:, None] * width + c[None, :], value.to(y.dtype.element_ty), mask)


@triton.jit
def backward(
    x,
    z,
    weight,
    bias,
    dy,
    dx,
    dz,
    sums,
    x_stride,
    z_stride,
    rows,
    width,
    passes,
    eps,
    R: tl.constexpr,
    D: tl.constexpr,
):
    """sums (programs 2 width): those of each program's R passes rows for the weight and the bias."""
    c = tl.arange(0, D)
    w = tl.load(weight + c, c < width, 0.0).to(tl.float32)
    b = tl.load(bias + c, c < width, 0.0).to(tl.float32)
    dweight, dbias = tl.zeros([D], tl.float32), tl.zeros([D], tl.float32)
    for i in range(passes):
        row = (tl.program_id(0).to(tl.int64) * passes + i) * R + tl.arange(0, R)
        mask = (row < rows)[:, None] & (c < width)[None, :]
        at = row[:, None] * width + c[None, :]
        normal, scale = _normal(x, x_stride, row, c, mask, width, eps)
        gate = tl.load(z + row[:, None] * z_stride + c[None, :], mask, 0.0).to(tl.float32)
        grad = tl.load(dy + at, mask, 0.0).to(tl.float32)
        slope = grad * (normal * w[None, :] + b[None, :]) * silu_slope(gate)
        tl.store(dz + at, slope.to(dz.dtype.element_ty), mask)
        grad *= silu(gate)
        dweight += tl.sum(grad * normal, 0)
        dbias += tl.sum(grad, 0)
        grad *= w[None, :]
        grad -= (tl.sum(grad, 1) / width)[:, None] + normal * (tl.sum(grad * normal, 1) / width)[:, None]
        tl.store(dx + at, (grad * scale[:, None]).to(dx.dtype.element_ty), mask)
    out = sums + tl.program_id(0).to(tl.int64) * 2 * width + c
    tl.store(out, dweight, c < width)
    tl.store(out + width, dbias, c < width)
