"""One token of the selective scan on a GPU: every program a tile of channels of one head of one sequence (E N)."""

import triton
import triton.language as tl

from ssmzoo.ops.triton.functions import silu, softplus


@triton.jit
def update(
    state,
    x,
    dt,
    A,
    B,
    C,
    D,
    z,
    dt_bias,
    rows,
    out,
    state_stride,
    x_stride,
    dt_stride,
    A_stride,
    B_stride,
    C_stride,
    D_stride,
    z_stride,
    bias_stride,
    out_stride,
    heads,
    channels,
    states,
    per_group,
    held,
    BY_HEAD: tl.constexpr,
    TIED: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    E: tl.constexpr,
    N: tl.constexpr,
):
    """Tensors are (b h e n), (b h e), (h e n) and (h e); B, C (b g n), by head or, of one head, by channel.

    held is how many rows the states have: a sequence of a row beyond gets NaN and touches nothing. TIED: dt and A have
    one value per head.
    """
    tiles = tl.cdiv(channels, E)  # everything along the one axis of the grid that has no limit
    program = tl.program_id(0).to(tl.int64)
    e = program % tiles * E + tl.arange(0, E)
    h, b = program // tiles % heads, program // tiles // heads
    own, n = e < channels, tl.arange(0, N).to(tl.int64)
    mask = own[:, None] & (n < states)[None, :]
    row = tl.zeros([1], tl.int64) + b
    if rows is not None:
        row = tl.load(rows + row).to(tl.int64)
    there = (row >= 0) & (row < held)
    at = row * state_stride[0] + h * state_stride[1] + e[:, None] * state_stride[2] + n[None, :] * state_stride[3]
    before = tl.load(state + at, mask & there, 0.0).to(tl.float32)
    value = tl.load(x + b * x_stride[0] + h * x_stride[1] + e * x_stride[2], own, 0.0).to(tl.float32)
    if TIED:
        step = tl.load(dt + b * dt_stride[0] + h * dt_stride[1]).to(tl.float32)
        if dt_bias is not None:
            step += tl.load(dt_bias + h * bias_stride[0]).to(tl.float32)
        if SOFTPLUS:
            step = softplus(step)
        decay = tl.exp(step * tl.load(A + h * A_stride[0]).to(tl.float32))
    else:
        step = tl.load(dt + b * dt_stride[0] + h * dt_stride[1] + e * dt_stride[2], own, 0.0).to(tl.float32)
        if dt_bias is not None:
            step += tl.load(dt_bias + h * bias_stride[0] + e * bias_stride[1], own, 0.0).to(tl.float32)
        if SOFTPLUS:
            step = softplus(step)
        rate = A + h * A_stride[0] + e[:, None] * A_stride[1] + n[None, :] * A_stride[2]
        decay = tl.exp(step[:, None] * tl.load(rate, mask, 0.0).to(tl.float32))
    if BY_HEAD:
        B_at, C_at = h // per_group * B_stride[1] + n * B_stride[2], h // per_group * C_stride[1] + n * C_stride[2]
        b_row = tl.load(B + b * B_stride[0] + B_at, n < states, 0.0).to(tl.float32)[None, :]
        c_row = tl.load(C + b * C_stride[0] + C_at, n < states, 0.0).to(tl.float32)[None, :]
    else:
        group = (e // per_group)[:, None]
        b_row = tl.load(B + b * B_stride[0] + group * B_stride[1] + n[None, :] * B_stride[2], mask, 0.0).to(tl.float32)
        c_row = tl.load(C + b * C_stride[0] + group * C_stride[1] + n[None, :] * C_stride[2], mask, 0.0).to(tl.float32)
    after = decay * before + (step * value)[:, None] * b_row
    tl.store(state + at, after.to(state.dtype.element_ty), mask & there)
    y = tl.sum(after * c_row, 1)
    if D is not None:
        y += tl.load(D + h * D_stride[0] + e * D_stride[1], own, 0.0).to(tl.float32) * value
    if z is not None:
        y *= silu(tl.load(z + b * z_stride[0] + h * z_stride[1] + e * z_stride[2], own, 0.0).to(tl.float32))
    if rows is not None:
        y = tl.where(row < 0, 0.0, tl.where(row < held, y, float("nan")))
    tl.store(out + b * out_stride[0] + h * out_stride[1] + e * out_stride[2], y.to(out.dtype.element_ty), own)
