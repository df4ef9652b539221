"""One token through a Mamba mixer on a GPU, in four launches.

A program holds some rows of a matrix and one sequence. Between the launches every row of one product is needed by every
row of the next: x_proj reads all channels, out_proj reads all channels, the next layer reads all of the stream.

    project   [x, z] = W_in norm(u), the convolution behind it, its state
    project   [dt, B, C] = W_x x
    advance   dt, the recurrence and its state, the gate
    project   out = W_out y, added to the residual stream
"""

import triton
import triton.language as tl

from ssmzoo.ops.triton.functions import silu, softplus


@triton.jit
def project(
    x,
    norm,
    weight,
    bias,
    add,
    conv_in,
    conv_weight,
    conv_bias,
    conv_out,
    out,
    x_stride,
    out_stride,
    add_stride,
    rows,
    width,
    first,
    channels,
    eps,
    K: tl.constexpr,
    E: tl.constexpr,
    W: tl.constexpr,
    KP: tl.constexpr,
):
    """out_r = <weight_r, x> + bias_r + add_r, for rows first .. first + channels followed by the convolution and SiLU.

    x (b width), weight (rows width) or None: x is the product already; norm (width): x is normalised, by RMS
    conv_in (b channels K) the last K products, of which the new one takes the last place in conv_out; may be the same
    """
    b = tl.program_id(1).to(tl.int64)
    r = tl.program_id(0).to(tl.int64) * E + tl.arange(0, E)
    own = r < rows
    if weight is None:
        y = tl.load(x + b * x_stride + r, own, 0.0).to(tl.float32)
    else:
        total = tl.zeros([E, W], tl.float32)
        squares = tl.zeros([W], tl.float32)
        for start in range(0, width, W):
            c = start + tl.arange(0, W)
            inside = c < width
            v = tl.load(x + b * x_stride + c, inside, 0.0).to(tl.float32)
            if norm is not None:
                squares += v * v
                v *= tl.load(norm + c, inside, 0.0).to(tl.float32)
            w = tl.load(weight + r[:, None] * width + c[None, :], own[:, None] & inside[None, :], 0.0)
            total += w.to(tl.float32) * v[None, :]
        y = tl.sum(total, 1)
        if norm is not None:
            y /= tl.sqrt(tl.sum(squares, 0) / width + eps)
        if bias is not None:
            y += tl.load(bias + r, own, 0.0).to(tl.float32)
    if K > 0:
        convolved = own & (r >= first) & (r < first + channels)
        k = tl.arange(0, KP)
        at = (b * channels + r - first)[:, None] * K + k[None, :]
        past = tl.load(conv_in + at + 1, convolved[:, None] & (k < K - 1)[None, :], 0.0).to(tl.float32)
        window = tl.where((k == K - 1)[None, :], y[:, None], past).to(conv_out.dtype.element_ty).to(tl.float32)
        taps = tl.load(conv_weight + (r - first)[:, None] * K + k[None, :], convolved[:, None] & (k < K)[None, :], 0.0)
        z = tl.sum(window * taps.to(tl.float32), 1)
        if conv_bias is not None:
            z += tl.load(conv_bias + r - first, convolved, 0.0).to(tl.float32)
        y = tl.where(convolved, silu(z), y)
        tl.debug_barrier()  # everything is read before anything is overwritten
        tl.store(conv_out + at, window.to(conv_out.dtype.element_ty), convolved[:, None] & (k < K)[None, :])
    if add is not None:
        y += tl.load(add + b * add_stride + r, own, 0.0).to(tl.float32)
    tl.store(out + b * out_stride + r, y.to(out.dtype.element_ty), own)


@triton.jit
def advance(
    xz,
    steps,
    dt_proj,
    dt_bias,
    A_log,
    D,
    state,
    after,
    out,
    channels,
    states,
    rank,
    E: tl.constexpr,
    N: tl.constexpr,
    R: tl.constexpr,
):
    """y (b e) of xz (b 2e) behind the convolution, steps (b r+2n) = [dt, B, C]; `after` may be `state` (b e n)."""
    e = tl.program_id(0).to(tl.int64) * E + tl.arange(0, E)
    b = tl.program_id(1).to(tl.int64)
    own, n, r = e < channels, tl.arange(0, N), tl.arange(0, R)
    mask, row = own[:, None] & (n < states)[None, :], steps + b * (rank + 2 * states)
    x = tl.load(xz + b * 2 * channels + e, own, 0.0)
    z = tl.load(xz + b * 2 * channels + channels + e, own, 0.0)
    low = tl.load(row + r, r < rank, 0.0)
    w = tl.load(dt_proj + e[:, None] * rank + r[None, :], own[:, None] & (r < rank)[None, :], 0.0).to(tl.float32)
    dt = softplus(tl.sum(w * low[None, :], 1) + tl.load(dt_bias + e, own, 0.0).to(tl.float32))
    B = tl.load(row + rank + n, n < states, 0.0)
    C = tl.load(row + rank + states + n, n < states, 0.0)
    rate = -tl.exp(tl.load(A_log + e[:, None] * states + n[None, :], mask, 0.0).to(tl.float32))
    at = (b * channels + e)[:, None] * states + n[None, :]
    h = tl.exp(dt[:, None] * rate) * tl.load(state + at, mask, 0.0).to(tl.float32) + (dt * x)[:, None] * B[None, :]
    tl.store(after + at, h.to(after.dtype.element_ty), mask)
    y = tl.sum(h * C[None, :], 1) + tl.load(D + e, own, 0.0).to(tl.float32) * x
    tl.store(out + b * channels + e, (y * silu(z)).to(out.dtype.element_ty), own)
