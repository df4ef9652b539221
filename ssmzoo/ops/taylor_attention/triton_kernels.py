"""Taylor linear attention on a GPU, as matrix products over chunks: the sums behind y_t, for values and their 1s.

With V the values followed by a column of ones, phi the features of ssmzoo.ops.taylor_attention, and s_tr = q_t . k_r of
q and k times f^(-1/4):
    O = W V + phi(q) S          S <- S + phi(k)' V          where W = 1 + s + s^2 / 2 inside the chunk
and backwards, given dO and the gradient G of S after the chunk:
    dV = W' dO + phi(k) G       ds = (dO V') o (1 + s)      dq = ds k + ...        dk = ds' q + ...
    dphi(q) = dO S'             dphi(k) = V G'              G <- G + phi(q)' dO
A program takes P columns of one head of one sequence through all chunks of Q positions. S and G stay in memory, which
is the cache, and are taken in pieces of up to F rows: the channels themselves, then for every channel its products with
those from it on. Before each stretch of chunks S is saved; the backward finds it between again. Every element is
written by one program; sums over programs are left to the caller.
"""

import triton
import triton.language as tl

from ssmzoo.ops.triton.functions import place, rows_inside, rows_of_head


@triton.jit
def _values(v, stride, seen, b, first, head, p, length, width, Q: tl.constexpr):
    """[v, 1] of the columns p, (Q P); zero where nobody may see the key."""
    inside = rows_inside(first, length, Q)
    if seen is not None:
        inside = inside & (tl.load(seen + b * length + first + tl.arange(0, Q), inside, 0) != 0)
    V = rows_of_head(v, stride, b, first, head, p, inside, p < width, Q)
    return tl.where(inside[:, None] & (p == width)[None, :], 1.0, V)


@triton.jit
def _documents(segment, b, first, length, Q: tl.constexpr):
    """Who sees whom (Q Q), who sees the sums before (Q), who is in the document at the end (Q), whether that one was
    there before; of the chunk that begins at `first`."""
    row, column = tl.arange(0, Q)[:, None], tl.arange(0, Q)[None, :]
    keep = row >= column
    start, end, whole = tl.full([Q], 1.0, tl.float32), tl.full([Q], 1.0, tl.float32), 1.0
    if segment is not None:
        line, last_one = segment + b * length, (length - 1 - first).to(tl.int32)
        here = tl.load(line + first + tl.minimum(tl.arange(0, Q), last_one))
        before = tl.load(line + tl.maximum(tl.minimum(first, length) - 1, 0))
        last = tl.load(line + tl.minimum(first + Q, length) - 1)
        keep = keep & (here[:, None] == here[None, :])
        start, end = tl.where(here == before, 1.0, 0.0), tl.where(here == last, 1.0, 0.0)
        whole = tl.where(before == last, 1.0, 0.0)
    return keep, start, end, whole


@triton.jit
def _piece(i, channels, own, p, columns, F: tl.constexpr):
    """Of piece i: the factors of its features (F), 0 where there are none, where its (F P) numbers of a state lie, and
    whether they exist."""
    j, c = tl.arange(0, F), i - 1
    row = tl.where(i == 0, 1 + j, 1 + channels + c * channels - c * (c - 1) // 2 + j - c)
    exists = (j < channels) & (j >= c)
    factor = tl.where(exists, tl.where(j == c, 0.7071067811865476, 1.0), 0.0)  # of a square: 1 / sqrt(2)
    return factor, row[:, None] * columns + p[None, :], exists[:, None] & own[None, :]


@triton.jit
def _channel(base, stride, b, first, head, i, inside, scale, Q: tl.constexpr):
    """Of piece i: the channel that all its features have, (Q); 1 for the channels themselves."""
    base += b * stride[0] + first * stride[1] + head * stride[2]
    x = tl.load(base + tl.arange(0, Q) * stride[1] + (i - 1) * stride[3], inside & (i > 0), 0.0).to(tl.float32)
    return tl.where(i == 0, 1.0, x * scale)


@triton.jit
def _copy(source, target, p, own, channels, columns, F: tl.constexpr):
    """This program's columns of a state."""
    tl.store(target + p, tl.load(source + p, own, 0.0), own)
    for i in range(channels + 1):
        _, at, mask = _piece(i, channels, own, p, columns, F)
        tl.store(target + at, tl.load(source + at, mask, 0.0), mask)


@triton.jit
def forward(
    q,
    k,
    v,
    seen,
    segment,
    sums,
    state,
    saved,
    q_stride,
    k_stride,
    v_stride,
    length,
    heads,
    channels,
    width,
    rows,
    stretches,
    stretch_chunks,
    pieces,
    slot,
    scale,
    SAVE: tl.constexpr,
    PRECISION: tl.constexpr,
    Q: tl.constexpr,
    F: tl.constexpr,
    P: tl.constexpr,
):
    """sums (b l h p+1); state (b h n p+1), n = rows, is advanced in place; saved (stretch b h n p+1)."""
    columns = width + 1
    b, h, block, p, own = place(heads, columns, P)
    f, p = tl.arange(0, F), p.to(tl.int32)
    slot += 0 * b  # 64 bits
    of_head = (b * heads + h) * rows * columns
    state += of_head
    for stretch in range(stretches):
        if SAVE:
            _copy(state, saved + stretch * slot + of_head, p, own, channels, columns, F)
        for c in range(stretch_chunks):
            first = (stretch * stretch_chunks + c) * Q + 0 * b
            inside = rows_inside(first, length, Q)
            q_t = rows_of_head(q, q_stride, b, first, h, f, inside, f < channels, Q) * scale
            k_t = rows_of_head(k, k_stride, b, first, h, f, inside, f < channels, Q) * scale
            V = _values(v, v_stride, seen, b, first, h, p, length, width, Q)
            keep, start, end, whole = _documents(segment, b, first, length, Q)
            s = tl.dot(q_t, tl.trans(k_t), input_precision=PRECISION)
            within = tl.dot(tl.where(keep, 1.0 + s + 0.5 * s * s, 0.0), V, input_precision=PRECISION)
            V *= end[:, None]
            S0 = tl.load(state + p, own, 0.0)
            O = tl.zeros([Q, P], tl.float32) + S0[None, :]
            tl.store(state + p, whole * S0 + tl.sum(V, 0), own)
            for i in range(pieces):
                factor, at, mask = _piece(i, channels, own, p, columns, F)
                q_i = _channel(q, q_stride, b, first, h, i, inside, scale, Q)[:, None] * factor[None, :]
                k_i = _channel(k, k_stride, b, first, h, i, inside, scale, Q)[:, None] * factor[None, :]
                S = tl.load(state + at, mask, 0.0)
                O += tl.dot(q_t * q_i, S, input_precision=PRECISION)
                S = whole * S + tl.dot(tl.trans(k_t * k_i), V, input_precision=PRECISION)
                tl.store(state + at, S, mask)
            O = within + O * start[:, None]
            here = ((b * length + first) * heads + h) * columns
            offsets = (tl.arange(0, Q) * heads)[:, None] * columns + p[None, :]
            tl.store(sums + here + offsets, O, inside[:, None] & own[None, :])


@triton.jit
def backward(
    q,
    k,
    v,
    seen,
    segment,
    saved,
    dsums,
    dstate,
    scratch,
    dq,
    dk,
    dv,
    q_stride,
    k_stride,
    v_stride,
    length,
    heads,
    channels,
    width,
    rows,
    stretches,
    stretch_chunks,
    pieces,
    slot,
    part,
    scale,
    PRECISION: tl.constexpr,
    Q: tl.constexpr,
    F: tl.constexpr,
    P: tl.constexpr,
):
    """dstate (b h n p+1) begins as the gradient of the last state and ends as that of the first; scratch (chunks of a
    stretch, b h n p+1) takes states. Unfinished sums: dq, dk (block b l h f) with `part` elements per block."""
    columns = width + 1
    b, h, block, p, own = place(heads, columns, P)
    f, p = tl.arange(0, F), p.to(tl.int32)
    slot, part = slot + 0 * b, part + 0 * b  # 64 bits
    of_head = (b * heads + h) * rows * columns
    dstate, scratch = dstate + of_head, scratch + of_head
    for n in range(stretches):
        stretch = stretches - 1 - n
        _copy(saved + stretch * slot + of_head, scratch, p, own, channels, columns, F)
        for c in range(stretch_chunks - 1):
            first = (stretch * stretch_chunks + c) * Q + 0 * b
            inside = rows_inside(first, length, Q)
            k_t = rows_of_head(k, k_stride, b, first, h, f, inside, f < channels, Q) * scale
            keep, start, end, whole = _documents(segment, b, first, length, Q)
            V = _values(v, v_stride, seen, b, first, h, p, length, width, Q) * end[:, None]
            now = scratch + c * slot
            tl.store(now + slot + p, whole * tl.load(now + p, own, 0.0) + tl.sum(V, 0), own)
            for i in range(pieces):
                factor, at, mask = _piece(i, channels, own, p, columns, F)
                k_i = _channel(k, k_stride, b, first, h, i, inside, scale, Q)[:, None] * factor[None, :]
                S = whole * tl.load(now + at, mask, 0.0)
                S += tl.dot(tl.trans(k_t * k_i), V, input_precision=PRECISION)
                tl.store(now + slot + at, S, mask)
        for j in range(stretch_chunks):
            c = stretch_chunks - 1 - j
            first = (stretch * stretch_chunks + c) * Q + 0 * b
            inside = rows_inside(first, length, Q)
            q_t = rows_of_head(q, q_stride, b, first, h, f, inside, f < channels, Q) * scale
            k_t = rows_of_head(k, k_stride, b, first, h, f, inside, f < channels, Q) * scale
            V = _values(v, v_stride, seen, b, first, h, p, length, width, Q)
            keep, start, end, whole = _documents(segment, b, first, length, Q)
            token = (b * length + first) * heads + h
            offsets = (tl.arange(0, Q) * heads)[:, None] * columns + p[None, :]
            dO = tl.load(dsums + token * columns + offsets, inside[:, None] & own[None, :], 0.0)
            s = tl.dot(q_t, tl.trans(k_t), input_precision=PRECISION)
            W = tl.where(keep, 1.0 + s + 0.5 * s * s, 0.0)
            ds = tl.where(keep, tl.dot(dO, tl.trans(V), input_precision=PRECISION) * (1.0 + s), 0.0)
            dV = tl.dot(tl.trans(W), dO, input_precision=PRECISION)
            dq_t = tl.dot(ds, k_t, input_precision=PRECISION)
            dk_t = tl.dot(tl.trans(ds), q_t, input_precision=PRECISION)
            dO *= start[:, None]
            V *= end[:, None]
            G0 = tl.load(dstate + p, own, 0.0)
            through = tl.zeros([Q, P], tl.float32) + G0[None, :]
            tl.store(dstate + p, whole * G0 + tl.sum(dO, 0), own)
            for i in range(pieces):
                factor, at, mask = _piece(i, channels, own, p, columns, F)
                q_i = _channel(q, q_stride, b, first, h, i, inside, scale, Q)
                k_i = _channel(k, k_stride, b, first, h, i, inside, scale, Q)
                S, G = tl.load(scratch + c * slot + at, mask, 0.0), tl.load(dstate + at, mask, 0.0)
                dphi = tl.dot(dO, tl.trans(S), input_precision=PRECISION) * factor[None, :]
                here = (f == i - 1)[None, :]
                dq_t += dphi * q_i[:, None] + tl.where(here, tl.sum(dphi * q_t, 1)[:, None], 0.0)
                dphi = tl.dot(V, tl.trans(G), input_precision=PRECISION) * factor[None, :]
                dk_t += dphi * k_i[:, None] + tl.where(here, tl.sum(dphi * k_t, 1)[:, None], 0.0)
                phi = k_t * k_i[:, None] * factor[None, :]
                through += tl.dot(phi, G, input_precision=PRECISION)
                phi = q_t * q_i[:, None] * factor[None, :]
                tl.store(dstate + at, whole * G + tl.dot(tl.trans(phi), dO, input_precision=PRECISION), mask)
            dV += through * end[:, None]
            here = block * part + token * channels
            offsets = (tl.arange(0, Q) * heads)[:, None] * channels + f[None, :]
            mask = inside[:, None] & (f < channels)[None, :]
            tl.store(dq + here + offsets, dq_t * scale, mask)
            tl.store(dk + here + offsets, dk_t * scale, mask)
            if seen is not None:
                dV = tl.where((tl.load(seen + b * length + first + tl.arange(0, Q), inside, 0) != 0)[:, None], dV, 0.0)
            offsets = (tl.arange(0, Q) * heads)[:, None] * width + p[None, :]
            mask = inside[:, None] & (p < width)[None, :]
            tl.store(dv + token * width + offsets, dV.to(dv.dtype.element_ty), mask)
