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
With `diagonal` (Mamba-3) its element w_s stands for L_ts dt_s where t and s are of one token of RANKS positions:
dX leaves these pairs out; dx_s and dw_s take their sums over t of w_s CB_ts dY_t and of CB_ts <dY_t, x_s>.
Sums of a are accumulated for every pair, never as differences of long sums. Before each stretch of chunks the state is
saved; the backward finds the states between again. Every element is written by one program; sums over programs are left
to the caller.
"""

import triton
import triton.language as tl

from ssmzoo.ops.triton.functions import place, rows_inside, rows_of_head


@triton.jit
def _decays(a, segment, b, h, first, length, heads, Q: tl.constexpr):
    """L (Q Q), start (Q), end (Q), whole; the chunk begins at position `first`."""
    row, column = tl.arange(0, Q)[:, None], tl.arange(0, Q)[None, :]
    a += (b * heads + h) * length + first  # 64 bits once; within a chunk 32 take fewer registers
    a_t = tl.load(a + tl.arange(0, Q), rows_inside(first, length, Q), 0.0)
    later = tl.where(row > column, a_t[:, None], 0.0)
    keep = row >= column
    start, end, whole = tl.cumsum(a_t, 0), tl.sum(later, 0), tl.sum(a_t, 0)
    L = tl.exp(tl.where(keep, tl.cumsum(later, 0), -float("inf")))
    start, end, whole = tl.exp(start), tl.exp(end), tl.exp(whole)
    if segment is not None:
        line = segment + b * length
        here = tl.load(line + tl.minimum(first + tl.arange(0, Q), length - 1))
        there = tl.load(line + tl.minimum(first + tl.arange(0, Q), length - 1))  # the same, along the columns
        before = tl.load(line + tl.maximum(tl.minimum(first, length) - 1, 0))
        last = tl.load(line + tl.minimum(first + Q, length) - 1)
        L = tl.where(here[:, None] == there[None, :], L, 0.0)
        start = tl.where(here == before, start, 0.0)
        end = tl.where(here == last, end, 0.0)
        whole = tl.where(before == last, whole, 0.0)
    return L, start, end, whole


@triton.jit
def _one_token(Q: tl.constexpr, RANKS: tl.constexpr):
    """(Q Q) whether two positions are of one token."""
    return (tl.arange(0, Q) // RANKS)[:, None] == (tl.arange(0, Q) // RANKS)[None, :]


@triton.jit
def _weights(dt, diagonal, b, h, start_at, end, L, length, heads, Q: tl.constexpr, RANKS: tl.constexpr):
    """What position s (a column) weighs in y_t (a row) apart from CB, and in the state after the chunk: (Q Q), (Q)."""
    positions, inside = (b * heads + h) * length + start_at + tl.arange(0, Q), rows_inside(start_at, length, Q)
    weights, ending = L, end
    if dt is not None:
        dt_t = tl.load(dt + positions, inside, 0.0)
        weights, ending = L * dt_t[None, :], end * dt_t
    if diagonal is not None:
        w = tl.load(diagonal + positions, inside, 0.0)
        weights = tl.where(_one_token(Q, RANKS), w[None, :], weights)
    return weights, ending


@triton.jit
def forward(
    x,
    dt,
    a,
    B,
    C,
    D,
    diagonal,
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
    RANKS: tl.constexpr,
    Q: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
):
    b, h, block, p, own = place(heads, width, P)
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
            inside = rows_inside(start_at, length, Q)
            x_t = rows_of_head(x, x_stride, b, start_at, h, p, inside, own, Q)
            B_t = rows_of_head(B, B_stride, b, start_at, g, n, inside, n < n_states, Q)
            C_t = rows_of_head(C, C_stride, b, start_at, g, n, inside, n < n_states, Q)
            L, start, end, whole = _decays(a, segment, b, h, start_at, length, heads, Q)
            CB = tl.dot(C_t, tl.trans(B_t), input_precision=PRECISION)
            weights, ending = _weights(dt, diagonal, b, h, start_at, end, L, length, heads, Q, RANKS)
            Y = tl.dot(CB * weights, x_t, input_precision=PRECISION)
            Y += tl.dot(C_t, tl.trans(S), input_precision=PRECISION) * start[:, None]
            if D is not None:
                Y += x_t * tl.load(D + h * width + p, own, 0.0)[None, :]
            y_t = y + b * y_stride[0] + start_at * y_stride[1] + h * y_stride[2]
            offsets = tl.arange(0, Q)[:, None] * y_stride[1] + p[None, :] * y_stride[3]
            tl.store(y_t + offsets, Y.to(y.dtype.element_ty), inside[:, None] & own[None, :])
            S = whole * S + tl.dot(tl.trans(x_t * ending[:, None]), B_t, input_precision=PRECISION)
    tl.store(last + state_at, S, states)


@triton.jit
def _piece(p, own, first, n_states, K: tl.constexpr):
    """(P K) of a head's states: which exist, and where they lie; 32 bits take fewer registers."""
    n = first + tl.arange(0, K)
    return own[:, None] & (n < n_states)[None, :], p[:, None] * n_states + n[None, :]


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
    RANKS: tl.constexpr,
    Q: tl.constexpr,
    P: tl.constexpr,
    K: tl.constexpr,
):
    """What goes through the states; `pairs` adds what stays within a chunk.

    scratch (chunks of a stretch and one, b h p n) takes states and, last, G: they need not be in registers at once.
    Unfinished sums: dx (b l h p) in fp32; da, ddt (block b l h), dB, dC (block b l h n) with `part` and `part_n`
    elements per block; dD (b h p)."""
    b, h, block, p, own = place(heads, width, P)
    g, p = h // per_group, p.to(tl.int32)
    slot, part, part_n = slot + 0 * b, part + 0 * b, part_n + 0 * b  # 64 bits
    of_head = (b * heads + h) * width * n_states
    saved, scratch = saved + of_head, scratch + of_head
    row, column = tl.arange(0, Q)[:, None], tl.arange(0, Q)[None, :]
    carry = scratch + stretch_chunks * slot
    for m in range(0, n_states, K):  # in pieces, whose operands need few registers
        states, at = _piece(p, own, m, n_states, K)
        G = tl.zeros([P, K], tl.float32)
        if dlast is not None:
            G = tl.load(dlast + of_head + at, states, 0.0)
        tl.store(carry + at, G, states)
    dD_p = tl.zeros([P], tl.float32)
    for k in range(stretches):
        stretch = stretches - 1 - k
        for m in range(0, n_states, K):
            states, at = _piece(p, own, m, n_states, K)
            tl.store(scratch + at, tl.load(saved + stretch * slot + at, states, 0.0), states)
        for i in range(stretch_chunks - 1):
            start_at = (stretch * stretch_chunks + i) * Q + 0 * b
            inside = rows_inside(start_at, length, Q)
            x_t = rows_of_head(x, x_stride, b, start_at, h, p, inside, own, Q)
            L, start, end, whole = _decays(a, segment, b, h, start_at, length, heads, Q)
            _, ending = _weights(dt, None, b, h, start_at, end, L, length, heads, Q, RANKS)
            for m in range(0, n_states, K):
                states, at = _piece(p, own, m, n_states, K)
                n = m + tl.arange(0, K)
                B_m = rows_of_head(B, B_stride, b, start_at, g, n, inside, n < n_states, Q)
                S = whole * tl.load(scratch + i * slot + at, states, 0.0)
                S += tl.dot(tl.trans(x_t * ending[:, None]), B_m, input_precision=PRECISION)
                tl.store(scratch + (i + 1) * slot + at, S, states)
        tl.debug_barrier()  # other threads read the states
        for j in range(stretch_chunks):
            i = stretch_chunks - 1 - j
            start_at = (stretch * stretch_chunks + i) * Q + 0 * b
            inside = rows_inside(start_at, length, Q)
            x_t = rows_of_head(x, x_stride, b, start_at, h, p, inside, own, Q)
            token, position = (b * length + start_at) * heads + h, (b * heads + h) * length + start_at
            dY = rows_of_head(dy, dy_stride, b, start_at, h, p, inside, own, Q)
            L, start, end, whole = _decays(a, segment, b, h, start_at, length, heads, Q)
            _, ending = _weights(dt, None, b, h, start_at, end, L, length, heads, Q, RANKS)
            if D is not None:
                dD_p += tl.sum(dY * x_t, 0)
            here = block * part_n + token * n_states
            GS, starting = tl.zeros([P], tl.float32), tl.zeros([Q], tl.float32)
            for m in range(0, n_states, K):  # two loops, each of which keeps its own operands in registers
                states, at = _piece(p, own, m, n_states, K)
                n = m + tl.arange(0, K)
                existing = n < n_states
                C_m = rows_of_head(C, C_stride, b, start_at, g, n, inside, existing, Q)
                S = tl.load(scratch + i * slot + at, states, 0.0)
                GS += tl.sum(tl.load(carry + at, states, 0.0) * S, 1)
                through = tl.dot(dY, S, input_precision=PRECISION) * start[:, None]
                starting += tl.sum(C_m * through, 1)
                offsets = (tl.arange(0, Q) * heads)[:, None] * n_states + n[None, :]
                tl.store(dC + here + offsets, through, inside[:, None] & existing[None, :])
            dY_start = tl.trans(dY * start[:, None])
            BG, into = tl.zeros([Q, P], tl.float32), tl.zeros([Q], tl.float32)
            for m in range(0, n_states, K):
                states, at = _piece(p, own, m, n_states, K)
                n = m + tl.arange(0, K)
                existing = n < n_states
                B_m = rows_of_head(B, B_stride, b, start_at, g, n, inside, existing, Q)
                C_m = rows_of_head(C, C_stride, b, start_at, g, n, inside, existing, Q)
                G = tl.load(carry + at, states, 0.0)
                BG += tl.dot(B_m, tl.trans(G), input_precision=PRECISION)
                through = tl.dot(x_t, G, input_precision=PRECISION) * ending[:, None]
                into += tl.sum(B_m * through, 1)
                offsets = (tl.arange(0, Q) * heads)[:, None] * n_states + n[None, :]
                tl.store(dB + here + offsets, through, inside[:, None] & existing[None, :])
                tl.store(carry + at, whole * G + tl.dot(dY_start, C_m, input_precision=PRECISION), states)
            da_t = tl.cumsum(starting, 0, reverse=True) + whole * tl.sum(GS)
            da_t += tl.sum(tl.where(row < column, into[:, None], 0.0), 0)
            position += block * part
            tl.store(da + position + tl.arange(0, Q), da_t, inside)
            if dt is not None:
                tl.store(ddt + position + tl.arange(0, Q), tl.sum(BG * x_t, 1) * end, inside)
            dx_t = dx + token * width + (tl.arange(0, Q) * heads)[:, None] * width + p[None, :]
            tl.store(dx_t, BG * ending[:, None], inside[:, None] & own[None, :])
            tl.debug_barrier()  # before other threads read G, and the scratch is written again
    if D is not None:
        tl.store(dD + (b * heads + h) * width + p, dD_p, own)
    if dfirst is not None:
        for m in range(0, n_states, K):
            states, at = _piece(p, own, m, n_states, K)
            G = tl.load(carry + at, states, 0.0)
            tl.store(dfirst + of_head + at, G.to(dfirst.dtype.element_ty), states)


@triton.jit
def pairs(
    x,
    dt,
    a,
    B,
    C,
    D,
    diagonal,
    segment,
    dy,
    through,
    dx,
    ddt,
    da,
    dB,
    dC,
    ddiagonal,
    x_stride,
    B_stride,
    C_stride,
    dy_stride,
    length,
    heads,
    per_group,
    width,
    n_states,
    chunks,
    PRECISION: tl.constexpr,
    RANKS: tl.constexpr,
    Q: tl.constexpr,
    P: tl.constexpr,
    K: tl.constexpr,
):
    """What stays within a chunk, which is a program's; `through` (b l h p) is backward's share of dx, which is finished
    here. da, ddt, ddiagonal (b l h), dB and dC (b l h n) are one more share of these sums."""
    program = tl.program_id(0)
    h, b = (program // chunks % heads).to(tl.int64), (program // chunks // heads).to(tl.int64)
    g, start_at = h // per_group, program % chunks * Q + 0 * b
    row, column = tl.arange(0, Q)[:, None], tl.arange(0, Q)[None, :]
    inside = rows_inside(start_at, length, Q)
    token, steps = (b * length + start_at) * heads + h, tl.arange(0, Q) * heads
    positions = (b * heads + h) * length + start_at + tl.arange(0, Q)
    CB, dCB = tl.zeros([Q, Q], tl.float32), tl.zeros([Q, Q], tl.float32)
    for m in range(0, n_states, K):
        n = m + tl.arange(0, K)
        C_m = rows_of_head(C, C_stride, b, start_at, g, n, inside, n < n_states, Q)
        B_m = rows_of_head(B, B_stride, b, start_at, g, n, inside, n < n_states, Q)
        CB += tl.dot(C_m, tl.trans(B_m), input_precision=PRECISION)
    for m in range(0, width, P):
        p = m + tl.arange(0, P)
        x_t = rows_of_head(x, x_stride, b, start_at, h, p, inside, p < width, Q)
        dY = rows_of_head(dy, dy_stride, b, start_at, h, p, inside, p < width, Q)
        dCB += tl.dot(dY, tl.trans(x_t), input_precision=PRECISION)
    L, start, end, whole = _decays(a, segment, b, h, start_at, length, heads, Q)
    both = CB * dCB
    if diagonal is not None:
        same = _one_token(Q, RANKS)
        tl.store(ddiagonal + positions, tl.sum(tl.where(same, both, 0.0), 0), inside)
        both = tl.where(same, 0.0, both)
    if dt is not None:
        tl.store(ddt + positions, tl.sum(both * L, 0), inside)
    weights, _ = _weights(dt, diagonal, b, h, start_at, end, L, length, heads, Q, RANKS)
    dCB *= weights
    later = tl.cumsum(tl.where(row > column, dCB * CB, 0.0), 0, reverse=True)
    tl.store(da + positions, tl.sum(tl.where(row > column, later, 0.0), 1), inside)
    CB = tl.trans(CB * weights)
    for m in range(0, width, P):
        p = m + tl.arange(0, P)
        dY = rows_of_head(dy, dy_stride, b, start_at, h, p, inside, p < width, Q)
        dx_t = tl.dot(CB, dY, input_precision=PRECISION)
        if D is not None:
            dx_t += dY * tl.load(D + h * width + p, p < width, 0.0)[None, :]
        offsets, mask = token * width + steps[:, None] * width + p[None, :], inside[:, None] & (p < width)[None, :]
        dx_t += tl.load(through + offsets, mask, 0.0)
        tl.store(dx + offsets, dx_t.to(dx.dtype.element_ty), mask)
    for m in range(0, n_states, K):
        n = m + tl.arange(0, K)
        C_m = rows_of_head(C, C_stride, b, start_at, g, n, inside, n < n_states, Q)
        B_m = rows_of_head(B, B_stride, b, start_at, g, n, inside, n < n_states, Q)
        offsets, mask = (
            token * n_states + steps[:, None] * n_states + n[None, :],
            inside[:, None] & (n < n_states)[None, :],
        )
        tl.store(dC + offsets, tl.dot(dCB, B_m, input_precision=PRECISION), mask)
        tl.store(dB + offsets, tl.dot(tl.trans(dCB), C_m, input_precision=PRECISION), mask)
