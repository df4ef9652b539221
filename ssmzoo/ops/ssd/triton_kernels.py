"""Mamba-2's scan on a GPU: S_t = e^{a_t} S_{t-1} + dt_t x_t (outer) B_t, y_t = S_t C_t + D x_t, as matrix products.

A program takes P of a head's channels of one sequence through all chunks of Q positions, its state (P N) in registers.
Inside a chunk, with L_ts = exp(a_{s+1} + ... + a_t), start_t = exp(a_0 + ... + a_t), whole = start_last and
end_s = exp(a_{s+1} + ... + a_last), all 0 across a reset, and X = dt x:
    Y = (L o C B') X + start o (C S')              S_next = whole S + (end o X)' B
and backwards, given dY and the gradient G of S_next:
    dX = (L o C B')' dY + end o (B G')             dS = whole G + (start o dY)' C
    dCB = dY X' o L      dC = dCB B + start o (dY S)      dB = dCB' C + end o (X G)
    da_r = sum over s < r <= t of (dCB o CB)_ts + whole <G, S>
           + sum_{t >= r} <C_t, start_t (dY S)_t> + sum_{s < r} <B_s, end_s (X G)_s>
Sums of a are accumulated for every pair, never as differences of long sums. Before each stretch of chunks the state is
saved; the backward finds the states between again. Every element is written by one program; sums over programs are left
to the caller.
"""

import triton
import triton.language as tl


@triton.jit
def _place(heads, width, P: tl.constexpr):
    """(sequence, head, block of the head, channels (P), whether they exist (P))"""
    program, blocks = tl.program_id(0), tl.cdiv(width, P)
    p = program % blocks * P + tl.arange(0, P)
    b = (program // (blocks * heads)).to(tl.int64)
    return b, (program // blocks % heads).to(tl.int64), program % blocks, p.to(tl.int64), p < width


@triton.jit
def _rows(base, stride, b, first, head, columns, inside, existing, Q: tl.constexpr):
    """(Q columns) of a (b l h .) tensor in fp32; offsets within a chunk have 32 bits and take fewer registers."""
    base += b * stride[0] + first * stride[1] + head * stride[2]
    offsets = tl.arange(0, Q)[:, None] * stride[1] + columns[None, :] * stride[3]
    return tl.load(base + offsets, inside[:, None] & existing[None, :], 0.0).to(tl.float32)


@triton.jit
def _decays(a, segment, b, h, t, first, length, heads, Q: tl.constexpr):
    """L (Q Q), start (Q), end (Q), whole; the chunk begins at position `first`."""
    row, column = tl.arange(0, Q)[:, None], tl.arange(0, Q)[None, :]
    a_t = tl.load(a + (b * length + t) * heads + h, t < length, 0.0)
    later = tl.where(row > column, a_t[:, None], 0.0)
    keep = row >= column
    start, end, whole = tl.cumsum(a_t, 0), tl.sum(later, 0), tl.sum(a_t, 0)
    L = tl.exp(tl.where(keep, tl.cumsum(later, 0), -float("inf")))
    start, end, whole = tl.exp(start), tl.exp(end), tl.exp(whole)
    if segment is not None:
        line = segment + b * length
        here = tl.load(line + tl.minimum(t, length - 1))
        there = tl.load(line + tl.minimum(first + tl.arange(0, Q), length - 1))  # the same, along the columns
        before = tl.load(line + tl.maximum(tl.minimum(first, length) - 1, 0))
        last = tl.load(line + tl.minimum(first + Q, length) - 1)
        L = tl.where(here[:, None] == there[None, :], L, 0.0)
        start = tl.where(here == before, start, 0.0)
        end = tl.where(here == last, end, 0.0)
        whole = tl.where(before == last, whole, 0.0)
    return L, start, end, whole


@triton.jit
def _inputs(x, x_stride, dt, b, h, p, start_at, own, length, heads, Q: tl.constexpr):
    """x and X = dt x of a chunk, (Q P)."""
    t = start_at + tl.arange(0, Q)
    inside = t < length
    x_t = _rows(x, x_stride, b, start_at, h, p, inside, own, Q)
    X = x_t
    if dt is not None:
        X = x_t * tl.load(dt + (b * length + t) * heads + h, inside, 0.0)[:, None]
    return x_t, X


@triton.jit
def forward(
    x,
    dt,
    a,
    B,
    C,
    D,
    first,
    segment,
    y,
    last,
    saved,
    x_stride,
    B_stride,
    C_stride,
    y_stride,
    length,
    heads,
    per_group,
    width,
    n_states,
    stretches,
    stretch_chunks,
    slot,
    SAVE: tl.constexpr,
    PRECISION: tl.constexpr,
    Q: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
):
    b, h, block, p, own = _place(heads, width, P)
    g, n, p = h // per_group, tl.arange(0, N), p.to(tl.int32)
    slot += 0 * b  # 64 bits
    state_at = ((b * heads + h) * width + p[:, None]) * n_states + n[None, :]
    states = own[:, None] & (n < n_states)[None, :]
    S = tl.zeros([P, N], tl.float32)
    if first is not None:
        S = tl.load(first + state_at, states, 0.0)
    for stretch in range(stretches):
        if SAVE:
            tl.store(saved + stretch * slot + state_at, S, states)
        for i in range(stretch_chunks):
            start_at = (stretch * stretch_chunks + i) * Q + 0 * b
            t = start_at + tl.arange(0, Q).to(tl.int64)
            inside = t < length
            x_t, X = _inputs(x, x_stride, dt, b, h, p, start_at, own, length, heads, Q)
            B_t = _rows(B, B_stride, b, start_at, g, n, inside, n < n_states, Q)
            C_t = _rows(C, C_stride, b, start_at, g, n, inside, n < n_states, Q)
            L, start, end, whole = _decays(a, segment, b, h, t, start_at, length, heads, Q)
            CB = tl.dot(C_t, tl.trans(B_t), input_precision=PRECISION)
            Y = tl.dot(CB * L, X, input_precision=PRECISION)
            Y += tl.dot(C_t, tl.trans(S), input_precision=PRECISION) * start[:, None]
            if D is not None:
                Y += x_t * tl.load(D + h * width + p, own, 0.0)[None, :]
            offsets = b * y_stride[0] + t[:, None] * y_stride[1] + h * y_stride[2] + p[None, :] * y_stride[3]
            tl.store(y + offsets, Y.to(y.dtype.element_ty), inside[:, None] & own[None, :])
            S = whole * S + tl.dot(tl.trans(X * end[:, None]), B_t, input_precision=PRECISION)
    tl.store(last + state_at, S, states)


@triton.jit
def backward(
    x,
    dt,
    a,
    B,
    C,
    D,
    segment,
    saved,
    dy,
    dlast,
    scratch,
    dx,
    ddt,
    da,
    dB,
    dC,
    dD,
    dfirst,
    x_stride,
    B_stride,
    C_stride,
    dy_stride,
    length,
    heads,
    per_group,
    width,
    n_states,
    stretches,
    stretch_chunks,
    slot,
    part,
    part_n,
    PRECISION: tl.constexpr,
    Q: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    """scratch (chunks of a stretch and one, b h p n) takes states and, last, G: they need not be in registers at once.
    Unfinished sums: da, ddt (block b l h), dB, dC
    (block b l h n) with `part` and `part_n` elements per block, dD (b h p)."""
    b, h, block, p, own = _place(heads, width, P)
    g, n, p = h // per_group, tl.arange(0, N), p.to(tl.int32)
    slot, part, part_n = slot + 0 * b, part + 0 * b, part_n + 0 * b  # 64 bits
    existing = n < n_states
    state_at = p[:, None] * n_states + n[None, :]  # within a head: 32 bits take fewer registers
    saved, scratch = saved + (b * heads + h) * width * n_states, scratch + (b * heads + h) * width * n_states
    states = own[:, None] & existing[None, :]
    row, column = tl.arange(0, Q)[:, None], tl.arange(0, Q)[None, :]
    carry = scratch + stretch_chunks * slot + state_at
    G = tl.zeros([P, N], tl.float32)
    if dlast is not None:
        G = tl.load(dlast + (b * heads + h) * width * n_states + state_at, states, 0.0)
    tl.store(carry, G, states)
    dD_p = tl.zeros([P], tl.float32)
    for k in range(stretches):
        stretch = stretches - 1 - k
        S = tl.load(saved + stretch * slot + state_at, states, 0.0)
        for i in range(stretch_chunks):
            start_at = (stretch * stretch_chunks + i) * Q + 0 * b
            t = start_at + tl.arange(0, Q).to(tl.int64)
            tl.store(scratch + i * slot + state_at, S, states)
            x_t, X = _inputs(x, x_stride, dt, b, h, p, start_at, own, length, heads, Q)
            B_t = _rows(B, B_stride, b, start_at, g, n, t < length, existing, Q)
            L, start, end, whole = _decays(a, segment, b, h, t, start_at, length, heads, Q)
            S = whole * S + tl.dot(tl.trans(X * end[:, None]), B_t, input_precision=PRECISION)
        tl.debug_barrier()  # other threads read the states
        for j in range(stretch_chunks):
            i = stretch_chunks - 1 - j
            start_at = (stretch * stretch_chunks + i) * Q + 0 * b
            t = start_at + tl.arange(0, Q).to(tl.int64)
            inside = t < length
            S = tl.load(scratch + i * slot + state_at, states, 0.0)
            x_t = _rows(x, x_stride, b, start_at, h, p, inside, own, Q)
            tokens = (b * length + t) * heads + h
            dY = _rows(dy, dy_stride, b, start_at, h, p, inside, own, Q)
            B_t = _rows(B, B_stride, b, start_at, g, n, inside, existing, Q)
            C_t = _rows(C, C_stride, b, start_at, g, n, inside, existing, Q)
            L, start, end, whole = _decays(a, segment, b, h, t, start_at, length, heads, Q)
            CB = tl.zeros([Q, Q], tl.float32)
            for m in range(0, N, K):  # in pieces, whose operands need few registers
                n_m = m + tl.arange(0, K)
                C_m = _rows(C, C_stride, b, start_at, g, n_m, inside, n_m < n_states, Q)
                B_m = _rows(B, B_stride, b, start_at, g, n_m, inside, n_m < n_states, Q)
                CB += tl.dot(C_m, tl.trans(B_m), input_precision=PRECISION)
            dX = tl.dot(tl.trans(CB * L), dY, input_precision=PRECISION)
            dCB = tl.dot(dY, tl.trans(x_t), input_precision=PRECISION) * L
            if dt is not None:
                dt_t = tl.load(dt + tokens, inside, 0.0)
                dCB *= dt_t[None, :]
            pairs = tl.where(row > column, dCB * CB, 0.0)
            da_t = tl.sum(tl.where(row > column, tl.cumsum(pairs, 0, reverse=True), 0.0), 1)
            here = block * part_n + ((b * length + start_at) * heads + h) * n_states
            offsets = (tl.arange(0, Q) * heads)[:, None] * n_states + n[None, :]
            mask = inside[:, None] & existing[None, :]
            through = tl.dot(dY, S, input_precision=PRECISION) * start[:, None]  # the state is not needed further down
            da_t += tl.cumsum(tl.sum(C_t * through, 1), 0, reverse=True)
            tl.store(dC + here + offsets, through + tl.dot(dCB, B_t, input_precision=PRECISION), mask)
            G = tl.load(carry, states, 0.0)
            da_t += whole * tl.sum(G * tl.load(scratch + i * slot + state_at, states, 0.0))
            BG = tl.zeros([Q, P], tl.float32)
            for m in range(0, N, K):
                n_m = m + tl.arange(0, K)
                B_m = _rows(B, B_stride, b, start_at, g, n_m, inside, n_m < n_states, Q)
                G_m = tl.load(
                    scratch + stretch_chunks * slot + p[None, :] * n_states + n_m[:, None],
                    own[None, :] & (n_m < n_states)[:, None],
                    0.0,
                )
                BG += tl.dot(B_m, G_m, input_precision=PRECISION)
            dX += BG * end[:, None]
            ending = end
            if dt is not None:
                ending = end * dt_t
            through = tl.dot(x_t, G, input_precision=PRECISION) * ending[:, None]
            ending = tl.sum(B_t * through, 1)
            da_t += tl.sum(tl.where(row < column, ending[:, None], 0.0), 0)
            tl.store(dB + here + offsets, through + tl.dot(tl.trans(dCB), C_t, input_precision=PRECISION), mask)
            tl.store(da + block * part + tokens, da_t, inside)
            if dt is not None:
                tl.store(ddt + block * part + tokens, tl.sum(dX * x_t, 1), inside)
                dX *= dt_t[:, None]
            if D is not None:
                dD_p += tl.sum(dY * x_t, 0)
                dX += dY * tl.load(D + h * width + p, own, 0.0)[None, :]
            tl.store(
                dx + tokens[:, None] * width + p[None, :], dX.to(dx.dtype.element_ty), inside[:, None] & own[None, :]
            )
            G = whole * G + tl.dot(tl.trans(dY * start[:, None]), C_t, input_precision=PRECISION)
            tl.store(carry, G, states)
            tl.debug_barrier()  # other threads read it
        tl.debug_barrier()  # before the scratch is written again
    if D is not None:
        tl.store(dD + (b * heads + h) * width + p, dD_p, own)
    if dfirst is not None:
        tl.store(dfirst + (b * heads + h) * width * n_states + state_at, G.to(dfirst.dtype.element_ty), states)
