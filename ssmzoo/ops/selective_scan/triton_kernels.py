"""The selective scan on a GPU, forward and backward: h_t = a_t h_{t-1} + x_t with a = exp(dt A), x = dt u B.

A program takes E channels of one group of one sequence through all chunks of T steps. A chunk is a tile (E T); the n
states are done one after the other, each an associative scan along T, so that no tensor (b e l n) exists and nothing is
divided by products of decays. States cross from chunk to chunk through `states` (slot b e n), slot c before chunk c.
Each element is written by one program, sums over programs are left to the caller: two runs give the same bits.
"""

import triton
import triton.language as tl

from ssmzoo.ops.triton.functions import chain, silu, silu_slope, softplus, store_tile, tile


@triton.jit
def _place(size, blocks, groups, E: tl.constexpr):
    """(sequence, group, block of the group, channels (E), whether they exist (E)) of this program."""
    program = tl.program_id(0)
    part = program % (groups * blocks)
    block = part % blocks
    r = block * E + tl.arange(0, E)
    e = (part // blocks * size + r).to(tl.int64)
    return (program // (groups * blocks)).to(tl.int64), (part // blocks).to(tl.int64), block, e, r < size


@triton.jit
def _steps(delta, stride, bias, b, e, t, mask, SOFTPLUS: tl.constexpr):
    """(delta + bias, dt) of a tile; dt is 0 outside the mask, i.e. the state stays as it is."""
    raw = tile(delta, stride, b, e, t, mask)
    if bias is not None:
        raw += tl.load(bias + e, None)[:, None]
    dt = raw
    if SOFTPLUS:
        dt = softplus(raw)
    return raw, tl.where(mask, dt, 0.0)


@triton.jit
def _coefficient(M, stride, b, g, e, n, n_states, t, own, mask, CONSTANT: tl.constexpr):
    """B or C of state n: (E 1) when constant in time, (1 T) otherwise."""
    if CONSTANT:
        value = tl.load(M + e * n_states + n, own, 0.0)[:, None]
    else:
        value = tl.load(M + b * stride[0] + g * stride[1] + n * stride[2] + t * stride[3], mask, 0.0)
        value = value.to(tl.float32)[None, :]
    return value


@triton.jit
def forward(
    u,
    delta,
    A,
    B,
    C,
    D,
    z,
    bias,
    fresh,
    out,
    states,
    u_stride,
    delta_stride,
    B_stride,
    C_stride,
    z_stride,
    out_stride,
    length,
    width,
    n_states,
    groups,
    size,
    blocks,
    chunks,
    slot,
    SOFTPLUS: tl.constexpr,
    CONSTANT_B: tl.constexpr,
    CONSTANT_C: tl.constexpr,
    KEEP: tl.constexpr,
    E: tl.constexpr,
    T: tl.constexpr,
):
    b, g, block, e, own = _place(size, blocks, groups, E)
    e = tl.where(own, e, 0)
    slot += 0 * b  # 64 bits
    step = tl.arange(0, T).to(tl.int64)
    row = states + (b * width + e) * n_states
    for c in range(chunks):
        t = c * T + step
        inside = t < length
        mask = own[:, None] & inside[None, :]
        x = tile(u, u_stride, b, e, t, mask)
        raw, dt = _steps(delta, delta_stride, bias, b, e, t, mask, SOFTPLUS)
        y = tl.zeros([E, T], tl.float32)
        if D is not None:
            y += tl.load(D + e)[:, None] * x
        x *= dt
        if KEEP:
            here, there = row + c * slot, row + (c + 1) * slot
        else:
            here, there = row + c % 2 * slot, row + (c + 1) % 2 * slot
        if fresh is not None:
            new = (tl.load(fresh + b * length + t, inside, 0) != 0)[None, :]
        for n in range(n_states):
            decay = tl.exp(dt * tl.load(A + e * n_states + n)[:, None])
            if fresh is not None:
                decay = tl.where(new, 0.0, decay)
            B_n = _coefficient(B, B_stride, b, g, e, n, n_states, t, own, inside, CONSTANT_B)
            C_n = _coefficient(C, C_stride, b, g, e, n, n_states, t, own, inside, CONSTANT_C)
            product, h = tl.associative_scan((decay, x * B_n), 1, chain)
            h += product * tl.load(here + n)[:, None]
            y += h * C_n
            tl.store((there + n)[:, None] + 0 * step[None, :], h, own[:, None] & (step == T - 1)[None, :])
        if z is not None:
            y *= silu(tile(z, z_stride, b, e, t, mask))
        store_tile(out, out_stride, b, e, t, y, mask)
        tl.debug_barrier()  # the states of this chunk are read by other threads in the next


@triton.jit
def backward(
    u,
    delta,
    A,
    B,
    C,
    D,
    z,
    bias,
    fresh,
    states,
    dout,
    carries,
    du,
    ddelta,
    dz,
    dA,
    dB,
    dC,
    dD,
    dbias,
    u_stride,
    delta_stride,
    B_stride,
    C_stride,
    z_stride,
    dout_stride,
    du_stride,
    ddelta_stride,
    dz_stride,
    length,
    width,
    n_states,
    groups,
    size,
    blocks,
    chunks,
    slot,
    part,
    SOFTPLUS: tl.constexpr,
    CONSTANT_B: tl.constexpr,
    CONSTANT_C: tl.constexpr,
    E: tl.constexpr,
    T: tl.constexpr,
):
    """With p_t = a_t h_{t-1} and dh_t = C_t dy_t + a_{t+1} dh_{t+1}: d(dt_t A) = dh_t p_t and d(x_t) = dh_t.

    p is scanned itself, from (a_t, a_t x_{t-1}): h_t - x_t would lose it where decays are strong. `carries` (2 b e n)
    holds a_t dh_t of the chunk that follows; dA, constant dB and dC (chunk b e n), dD, dbias (chunk b e) and
    time-dependent dB, dC (block b g n l; `part` apart) are sums that the caller completes.
    """
    b, g, block, e, own = _place(size, blocks, groups, E)
    e = tl.where(own, e, 0)
    slot, part = slot + 0 * b, part + 0 * b  # 64 bits
    step = tl.arange(0, T).to(tl.int64)
    row = (b * width + e) * n_states
    for k in range(chunks):
        c = chunks - 1 - k
        t = c * T + step
        inside = t < length
        mask = own[:, None] & inside[None, :]
        u_t = tile(u, u_stride, b, e, t, mask)
        raw, dt = _steps(delta, delta_stride, bias, b, e, t, mask, SOFTPLUS)
        x = u_t * dt
        past = inside & (step > 0)  # t - 1 lies in this chunk
        earlier = own[:, None] & past[None, :]
        _, x_past = _steps(delta, delta_stride, bias, b, e, t - 1, earlier, SOFTPLUS)
        x_past *= tile(u, u_stride, b, e, t - 1, earlier)
        ahead = (t + 1 < length) & (step < T - 1)  # t + 1 lies in this chunk
        _, dt_ahead = _steps(delta, delta_stride, bias, b, e, t + 1, own[:, None] & ahead[None, :], SOFTPLUS)
        dy = tile(dout, dout_stride, b, e, t, mask)
        if z is not None:
            dy *= silu(tile(z, z_stride, b, e, t, mask))
        if fresh is not None:
            new = (tl.load(fresh + b * length + t, inside, 0) != 0)[None, :]
            new_ahead = (tl.load(fresh + b * length + t + 1, ahead, 0) != 0)[None, :]
        y = tl.zeros([E, T], tl.float32)
        dx = tl.zeros([E, T], tl.float32)
        ddt = tl.zeros([E, T], tl.float32)
        for n in range(n_states):
            A_n = tl.load(A + e * n_states + n)[:, None]
            decay, decay_ahead = tl.exp(dt * A_n), tl.exp(dt_ahead * A_n)
            if fresh is not None:
                decay, decay_ahead = tl.where(new, 0.0, decay), tl.where(new_ahead, 0.0, decay_ahead)
            B_n = _coefficient(B, B_stride, b, g, e, n, n_states, t, own, inside, CONSTANT_B)
            B_past = _coefficient(B, B_stride, b, g, e, n, n_states, t - 1, own, past, CONSTANT_B)
            C_n = _coefficient(C, C_stride, b, g, e, n, n_states, t, own, inside, CONSTANT_C)
            product, p = tl.associative_scan((decay, decay * x_past * B_past), 1, chain)
            p += product * tl.load(states + c * slot + row + n)[:, None]
            h = p + x * B_n
            y += h * C_n
            product, dh = tl.associative_scan((decay_ahead, dy * C_n), 1, chain, reverse=True)
            dh += product * tl.load(carries + (c + 1) % 2 * slot + row + n)[:, None]
            tl.store(
                (carries + c % 2 * slot + row + n)[:, None] + 0 * step[None, :],
                decay * dh,
                own[:, None] & (step == 0)[None, :],
            )
            dx += dh * B_n
            dlog = dh * p
            ddt += dlog * A_n
            tl.store(dA + c * slot + row + n, tl.sum(dlog * dt, 1), own)
            if CONSTANT_B:
                tl.store(dB + c * slot + row + n, tl.sum(dh * x, 1), own)
            else:
                line = block * part + ((b * groups + g) * n_states + n) * length
                tl.store(dB + line + t, tl.sum(dh * x, 0), inside)
            if CONSTANT_C:
                tl.store(dC + c * slot + row + n, tl.sum(dy * h, 1), own)
            else:
                line = block * part + ((b * groups + g) * n_states + n) * length
                tl.store(dC + line + t, tl.sum(dy * h, 0), inside)
        ddt += dx * u_t
        dx *= dt
        sums = (c * (slot // n_states)) + b * width + e
        if D is not None:
            D_e = tl.load(D + e)[:, None]
            dx += dy * D_e
            y += D_e * u_t
            tl.store(dD + sums, tl.sum(dy * u_t, 1), own)
        if z is not None:
            slope = silu_slope(tile(z, z_stride, b, e, t, mask)) * tile(dout, dout_stride, b, e, t, mask)
            store_tile(dz, dz_stride, b, e, t, y * slope, mask)
        if SOFTPLUS:
            ddt *= 1.0 / (1.0 + tl.exp(-raw))
        if bias is not None:
            tl.store(dbias + sums, tl.sum(tl.where(mask, ddt, 0.0), 1), own)
        store_tile(du, du_stride, b, e, t, dx, mask)
        store_tile(ddelta, ddelta_stride, b, e, t, ddt, mask)
        tl.debug_barrier()  # the carries of this chunk are read by other threads in the next
