"""The selective scan on a GPU, forward and backward: h_t = a_t h_{t-1} + x_t with a = exp(dt A), x = dt u B.

A program takes E channels of one group of one sequence through chunks of T steps. A chunk is a tile (E T); the n states
are done one after the other, each an associative scan along T, so that no tensor (b e l n) exists and nothing is
divided by products of decays. States cross from chunk to chunk through `states` (slot b e n). Each element is written
by one program, sums over programs are left to the caller: two runs give the same bits.

Few and long sequences are cut into segments of `per` chunks, one program each: `summaries` finds what a segment makes
of a state of zero and how much of another it keeps, `enter` takes states from segment to segment, and the same kernels
start there. Backwards likewise, with the gradients' recurrence.

Sequences (b g p l) are told by four strides: groups may share channels (stride 0). With MAP, positions lie on a map of
rows x columns, and group g walks it along its columns (bit g of `turns`) and from the end (bit g of `flips`).
"""

import triton
import triton.language as tl

from ssmzoo.ops.triton.functions import chain, silu, silu_slope, softplus


@triton.jit
def _place(size, blocks, groups, E: tl.constexpr):
    """(sequence, group, block of the group, channel of the group (E), channel (E), whether they exist (E))."""
    program = tl.program_id(0)
    part = program % (groups * blocks)
    block = part % blocks
    r = block * E + tl.arange(0, E)
    own = r < size
    r = tl.where(own, r, 0).to(tl.int64)
    g = (part // blocks).to(tl.int64)
    return (program // (groups * blocks)).to(tl.int64), g, block, r, g * size + r, own


@triton.jit
def _segment(chunks, per):
    """(segment, its first chunk, its chunks)"""
    segment = tl.program_id(1)
    return segment.to(tl.int64), segment * per, tl.minimum(per, chunks - segment * per)


@triton.jit
def _at(t, g, length, rows, columns, flips, turns, MAP: tl.constexpr):
    """Where step t of group g lies."""
    p = t
    if MAP:
        p = tl.where(((flips >> g) & 1) != 0, length - 1 - t, t)
        p = tl.where(((turns >> g) & 1) != 0, p % rows * columns + p // rows, p)
    return p


@triton.jit
def _offsets(stride, b, g, r, p):
    return b * stride[0] + g * stride[1] + r[:, None] * stride[2] + p.to(tl.int64)[None, :] * stride[3]


@triton.jit
def _tile(base, stride, b, g, r, p, mask):
    """(E T) of a sequence in fp32, zeros outside the mask."""
    return tl.load(base + _offsets(stride, b, g, r, p), mask, 0.0).to(tl.float32)


@triton.jit
def _store_tile(base, stride, b, g, r, p, value, mask):
    tl.store(base + _offsets(stride, b, g, r, p), value.to(base.dtype.element_ty), mask)


@triton.jit
def _steps(delta, stride, bias, b, g, r, e, p, mask, SOFTPLUS: tl.constexpr):
    """(delta + bias, dt) of a tile; dt is 0 outside the mask, i.e. the state stays as it is."""
    raw = _tile(delta, stride, b, g, r, p, mask)
    if bias is not None:
        raw += tl.load(bias + e, None)[:, None]
    dt = raw
    if SOFTPLUS:
        dt = softplus(raw)
    return raw, tl.where(mask, dt, 0.0)


@triton.jit
def _coefficient(M, stride, b, g, e, n, n_states, p, own, mask, CONSTANT: tl.constexpr):
    """B or C of state n: (E 1) when constant in time, (1 T) otherwise."""
    if CONSTANT:
        value = tl.load(M + e * n_states + n, own, 0.0)[:, None]
    else:
        at = b * stride[0] + g * stride[1] + (n + 0 * b) * stride[2] + p.to(tl.int64) * stride[3]
        value = tl.load(M + at, mask, 0.0)
        value = value.to(tl.float32)[None, :]
    return value


@triton.jit
def _fresh(fresh, b, t, length, mask):
    """(1 T) whether a new sequence starts at t."""
    return (tl.load(fresh + b * length + t, mask, 0) != 0)[None, :]


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
    per,
    slot,
    rows,
    columns,
    flips,
    turns,
    SOFTPLUS: tl.constexpr,
    CONSTANT_B: tl.constexpr,
    CONSTANT_C: tl.constexpr,
    KEEP: tl.constexpr,
    MAP: tl.constexpr,
    E: tl.constexpr,
    T: tl.constexpr,
):
    """`states`: with KEEP slot c before chunk c, else two slots for each segment in turn."""
    b, g, block, r, e, own = _place(size, blocks, groups, E)
    segment, begin, count = _segment(chunks, per)
    slot += 0 * b  # 64 bits
    step = tl.arange(0, T)
    row = states + (b * width + e) * n_states
    for k in range(count):
        c = begin + k
        t = c * T + step
        p = _at(t, g, length, rows, columns, flips, turns, MAP)
        inside = t < length
        mask = own[:, None] & inside[None, :]
        x = _tile(u, u_stride, b, g, r, p, mask)
        raw, dt = _steps(delta, delta_stride, bias, b, g, r, e, p, mask, SOFTPLUS)
        y = tl.zeros([E, T], tl.float32)
        if D is not None:
            y += tl.load(D + e)[:, None] * x
        x *= dt
        kept = own
        if KEEP:
            here, there = row + c * slot, row + (c + 1) * slot
            after = c + 1 + tl.zeros([E], tl.int32)
            kept = own & ((after < begin + count) | (after == chunks))  # a segment's first state is there already
        else:
            here, there = row + (2 * segment + k % 2) * slot, row + (2 * segment + (k + 1) % 2) * slot
        if fresh is not None:
            new = _fresh(fresh, b, t, length, inside)
        for n in range(n_states):
            decay = tl.exp(dt * tl.load(A + e * n_states + n)[:, None])
            if fresh is not None:
                decay = tl.where(new, 0.0, decay)
            B_n = _coefficient(B, B_stride, b, g, e, n, n_states, p, own, inside, CONSTANT_B)
            C_n = _coefficient(C, C_stride, b, g, e, n, n_states, p, own, inside, CONSTANT_C)
            product, h = tl.associative_scan((decay, x * B_n), 1, chain)
            h += product * tl.load(here + n)[:, None]
            y += h * C_n
            tl.store(tl.broadcast_to((there + n)[:, None], [E, T]), h, kept[:, None] & (step == T - 1)[None, :])
        if z is not None:
            y *= silu(_tile(z, z_stride, b, g, r, p, mask))
        _store_tile(out, out_stride, b, g, r, p, y, mask)
        tl.debug_barrier()  # the states of this chunk are read by other threads in the next


@triton.jit
def summaries(
    u,
    delta,
    A,
    M,
    z,
    bias,
    fresh,
    made,
    passed,
    kept,
    u_stride,
    delta_stride,
    M_stride,
    z_stride,
    length,
    width,
    n_states,
    groups,
    size,
    blocks,
    chunks,
    per,
    slot,
    rows,
    columns,
    flips,
    turns,
    SOFTPLUS: tl.constexpr,
    CONSTANT: tl.constexpr,
    REVERSE: tl.constexpr,
    MAP: tl.constexpr,
    E: tl.constexpr,
    T: tl.constexpr,
):
    """What every segment makes of a state of zero (`made`, segment b e n), the time that passes in it (`passed`,
    segment b e) and whether a state before it reaches its end (`kept`, likewise, 0 or 1).

    M is B, or with REVERSE C: then `u` is the gradient of the output and what is made is a_t dh_t of the first step.
    """
    b, g, block, r, e, own = _place(size, blocks, groups, E)
    segment, begin, count = _segment(chunks, per)
    slot += 0 * b  # 64 bits
    step = tl.arange(0, T)
    row = made + segment * slot + (b * width + e) * n_states
    time, reaches = tl.zeros([E], tl.float32), tl.full([E], 1.0, tl.float32)
    for k in range(count):
        c = begin + k
        done = k + tl.zeros([E], tl.int32)
        if REVERSE:
            c = begin + count - 1 - k
        t = c * T + step
        p = _at(t, g, length, rows, columns, flips, turns, MAP)
        inside = t < length
        mask = own[:, None] & inside[None, :]
        value = _tile(u, u_stride, b, g, r, p, mask)
        _, dt = _steps(delta, delta_stride, bias, b, g, r, e, p, mask, SOFTPLUS)
        if REVERSE:
            if z is not None:
                value *= silu(_tile(z, z_stride, b, g, r, p, mask))
            between = tl.cumsum(dt, 1)  # the steps from the first to t
        else:
            value *= dt
            ahead = (t + 1 < length) & (step < T - 1)
            q = _at(t + 1, g, length, rows, columns, flips, turns, MAP)
            later = own[:, None] & ahead[None, :]
            _, dt_ahead = _steps(delta, delta_stride, bias, b, g, r, e, q, later, SOFTPLUS)
            between = tl.cumsum(dt_ahead, 1, reverse=True)  # the steps after t, never as a difference of sums
        through = tl.sum(dt, 1)
        time += through
        whole = tl.full([E], 1.0, tl.float32)
        if fresh is not None:
            new = tl.load(fresh + b * length + t, inside, 0).to(tl.int32)
            whole = tl.where(tl.sum(new, 0) > 0, 0.0, whole)
            reaches *= whole
            if REVERSE:
                cut = tl.cumsum(new, 0) > 0
            else:
                new_ahead = tl.load(fresh + b * length + t + 1, ahead, 0).to(tl.int32)
                cut = tl.cumsum(new_ahead, 0, reverse=True) > 0
        for n in range(n_states):
            A_n = tl.load(A + e * n_states + n)
            weight = tl.exp(between * A_n[:, None])
            if fresh is not None:
                weight = tl.where(cut[None, :], 0.0, weight)
            M_n = _coefficient(M, M_stride, b, g, e, n, n_states, p, own, inside, CONSTANT)
            before = tl.load(row + n, own & (done > 0), 0.0)
            tl.store(row + n, whole * tl.exp(through * A_n) * before + tl.sum(weight * value * M_n, 1), own)
        tl.debug_barrier()  # what was made is read by other threads in the next chunk
    sums = (segment * (slot // n_states)) + b * width + e
    tl.store(passed + sums, time, own)
    tl.store(kept + sums, reaches, own)


@triton.jit
def enter(
    A,
    made,
    passed,
    kept,
    states,
    segments,
    width,
    n_states,
    slot,
    hop,
    REVERSE: tl.constexpr,
    N: tl.constexpr,
):
    """The state before every segment: slot `hop` x segment of `states`, of which the first one's is given (with
    REVERSE the last one's)."""
    at = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    slot += 0 * tl.program_id(0).to(tl.int64)  # 64 bits
    own = at < slot
    A_n = tl.load(A + at % (width * n_states), own, 0.0)
    s = 0
    if REVERSE:
        s = segments - 1
    h = tl.load(states + s * hop * slot + at, own, 0.0)
    for i in range(1, segments):
        row = at // n_states + s * (slot // n_states)
        decay = tl.load(kept + row, own, 0.0) * tl.exp(A_n * tl.load(passed + row, own, 0.0))
        h = decay * h + tl.load(made + s * slot + at, own, 0.0)
        if REVERSE:
            s = segments - 1 - i
        else:
            s = i
        tl.store(states + s * hop * slot + at, h, own)


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
    per,
    slot,
    rows,
    columns,
    flips,
    turns,
    part,
    SOFTPLUS: tl.constexpr,
    CONSTANT_B: tl.constexpr,
    CONSTANT_C: tl.constexpr,
    MAP: tl.constexpr,
    E: tl.constexpr,
    T: tl.constexpr,
):
    """With p_t = a_t h_{t-1} and dh_t = C_t dy_t + a_{t+1} dh_{t+1}: d(dt_t A) = dh_t p_t and d(x_t) = dh_t.

    p is scanned itself, from (a_t, a_t x_{t-1}): h_t - x_t would lose it where decays are strong. `carries` (two slots
    for each segment in turn, b e n) hold a_t dh_t of the chunk that follows; dA, constant dB and dC (chunk b e n), dD,
    dbias (chunk b e) and time-dependent dB, dC (block b g n l; `part` apart) are sums that the caller completes.
    """
    b, g, block, r, e, own = _place(size, blocks, groups, E)
    segment, begin, count = _segment(chunks, per)
    slot, part = slot + 0 * b, part + 0 * b  # 64 bits
    step = tl.arange(0, T)
    row = (b * width + e) * n_states
    for k in range(count):
        c = begin + count - 1 - k
        from_carry, to_carry = (2 * segment + k % 2) * slot, (2 * segment + (k + 1) % 2) * slot
        t = c * T + step
        p = _at(t, g, length, rows, columns, flips, turns, MAP)
        inside = t < length
        mask = own[:, None] & inside[None, :]
        u_t = _tile(u, u_stride, b, g, r, p, mask)
        raw, dt = _steps(delta, delta_stride, bias, b, g, r, e, p, mask, SOFTPLUS)
        x = u_t * dt
        past = inside & (step > 0)  # t - 1 lies in this chunk
        p_past = _at(t - 1, g, length, rows, columns, flips, turns, MAP)
        earlier = own[:, None] & past[None, :]
        _, x_past = _steps(delta, delta_stride, bias, b, g, r, e, p_past, earlier, SOFTPLUS)
        x_past *= _tile(u, u_stride, b, g, r, p_past, earlier)
        ahead = (t + 1 < length) & (step < T - 1)  # t + 1 lies in this chunk
        p_ahead = _at(t + 1, g, length, rows, columns, flips, turns, MAP)
        _, dt_ahead = _steps(delta, delta_stride, bias, b, g, r, e, p_ahead, own[:, None] & ahead[None, :], SOFTPLUS)
        dy = _tile(dout, dout_stride, b, g, r, p, mask)
        if z is not None:
            dy *= silu(_tile(z, z_stride, b, g, r, p, mask))
        if fresh is not None:
            new = _fresh(fresh, b, t, length, inside)
            new_ahead = _fresh(fresh, b, t + 1, length, ahead)
        y = tl.zeros([E, T], tl.float32)
        dx = tl.zeros([E, T], tl.float32)
        ddt = tl.zeros([E, T], tl.float32)
        for n in range(n_states):
            A_n = tl.load(A + e * n_states + n)[:, None]
            decay, decay_ahead = tl.exp(dt * A_n), tl.exp(dt_ahead * A_n)
            if fresh is not None:
                decay, decay_ahead = tl.where(new, 0.0, decay), tl.where(new_ahead, 0.0, decay_ahead)
            B_n = _coefficient(B, B_stride, b, g, e, n, n_states, p, own, inside, CONSTANT_B)
            B_past = _coefficient(B, B_stride, b, g, e, n, n_states, p_past, own, past, CONSTANT_B)
            C_n = _coefficient(C, C_stride, b, g, e, n, n_states, p, own, inside, CONSTANT_C)
            product, h = tl.associative_scan((decay, decay * x_past * B_past), 1, chain)
            h += product * tl.load(states + c * slot + row + n)[:, None]
            from_past = h
            h += x * B_n
            y += h * C_n
            product, dh = tl.associative_scan((decay_ahead, dy * C_n), 1, chain, reverse=True)
            dh += product * tl.load(carries + from_carry + row + n)[:, None]
            tl.store(
                tl.broadcast_to((carries + to_carry + row + n)[:, None], [E, T]),
                decay * dh,
                own[:, None] & (step == 0)[None, :],
            )
            dx += dh * B_n
            dlog = dh * from_past
            ddt += dlog * A_n
            tl.store(dA + c * slot + row + n, tl.sum(dlog * dt, 1), own)
            if CONSTANT_B:
                tl.store(dB + c * slot + row + n, tl.sum(dh * x, 1), own)
            else:
                line = block * part + ((b * groups + g) * n_states + n) * length
                tl.store(dB + line + p, tl.sum(dh * x, 0), inside)
            if CONSTANT_C:
                tl.store(dC + c * slot + row + n, tl.sum(dy * h, 1), own)
            else:
                line = block * part + ((b * groups + g) * n_states + n) * length
                tl.store(dC + line + p, tl.sum(dy * h, 0), inside)
        ddt += dx * u_t
        dx *= dt
        sums = (c * (slot // n_states)) + b * width + e
        if D is not None:
            D_e = tl.load(D + e)[:, None]
            dx += dy * D_e
            y += D_e * u_t
            tl.store(dD + sums, tl.sum(dy * u_t, 1), own)
        if z is not None:
            slope = silu_slope(_tile(z, z_stride, b, g, r, p, mask)) * _tile(dout, dout_stride, b, g, r, p, mask)
            _store_tile(dz, dz_stride, b, g, r, p, y * slope, mask)
        if SOFTPLUS:
            ddt *= 1.0 / (1.0 + tl.exp(-raw))
        if bias is not None:
            tl.store(dbias + sums, tl.sum(tl.where(mask, ddt, 0.0), 1), own)
        _store_tile(du, du_stride, b, g, r, p, dx, mask)
        _store_tile(ddelta, ddelta_stride, b, g, r, p, ddt, mask)
        tl.debug_barrier()  # the carries of this chunk are read by other threads in the next
