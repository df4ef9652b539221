"""The gated delta rule on a GPU: S <- e S,  u = beta (v - S'k),  S <- S + k u',  y = S'q; e = exp(g), 0 at a reset.

A program walks P columns of one head's state (N P) from the first step to the last in registers; columns know nothing
of each other. Everything is fp32 and nothing is a difference of long sums: the triangular systems of the form in matrix
products would want more than TF32's 10 bits. Before each stretch of steps the state is saved.

Backwards, with the gradient G of the state after a step, S~ = e S and d = v - S~'k:
    G += q dy'        dq = S~ dy + k <u, dy>      du = G'k      dv = beta du      dbeta = <du, d>
    dk = G u - S~ dv          G~ = G - k dv'          dg = the sums of G~ o S~ along a row          G <- e G~
S~ is written down every GROUP steps of a stretch, with d for every step, and found again between the two by
S~ <- e (S~ + k u'). Every element is written by one program; sums over programs are left to the caller.
"""

import triton
import triton.language as tl

from ssmzoo.ops.triton.functions import place


@triton.jit
def _vector(base, stride, b, t, h, columns, mask):
    """Of step t of a (b l h .) tensor, fp32."""
    at = b * stride[0] + t * stride[1] + h * stride[2] + columns * stride[3]
    return tl.load(base + at, mask, 0.0).to(tl.float32)


@triton.jit
def _decay(g, resets, b, token, t, length, n, own_n, n_keys, PER_CHANNEL: tl.constexpr):
    """e of every row, (N)."""
    if PER_CHANNEL:
        e = tl.exp(tl.load(g + token * n_keys + n, own_n, 0.0))
    else:
        e = tl.exp(tl.load(g + token + 0 * n))
    if resets is not None:
        e = tl.where(tl.load(resets + b * length + t) != 0, 0.0, e)
    return e


@triton.jit
def forward(
    q,
    k,
    v,
    g,
    beta,
    resets,
    first,
    y,
    last,
    saved,
    q_stride,
    k_stride,
    v_stride,
    length,
    heads,
    n_keys,
    width,
    stretches,
    stretch_steps,
    slot,
    SAVE: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
):
    b, h, block, p, own = place(heads, width, P)
    n = tl.arange(0, N)
    own_n = n < n_keys
    slot += 0 * b  # 64 bits
    mask = own_n[:, None] & own[None, :]
    state_at = ((b * heads + h) * n_keys + n[:, None]) * width + p[None, :]
    S = tl.zeros([N, P], tl.float32)
    if first is not None:
        S = tl.load(first + state_at, mask, 0.0)
    for stretch in range(stretches):
        if SAVE:
            tl.store(saved + stretch * slot + state_at, S, mask)
        for i in range(tl.minimum(stretch_steps, length - stretch * stretch_steps)):
            t = stretch * stretch_steps + i + 0 * b
            token = (b * length + t) * heads + h
            q_t, k_t = _vector(q, q_stride, b, t, h, n, own_n), _vector(k, k_stride, b, t, h, n, own_n)
            S *= _decay(g, resets, b, token, t, length, n, own_n, n_keys, PER_CHANNEL)[:, None]
            u = _vector(v, v_stride, b, t, h, p, own) - tl.sum(S * k_t[:, None], 0)
            u *= tl.load(beta + token)
            y_t = tl.sum(S * q_t[:, None], 0) + u * tl.sum(k_t * q_t)
            tl.store(y + token * width + p, y_t.to(y.dtype.element_ty), own)
            S += k_t[:, None] * u[None, :]
    tl.store(last + state_at, S, mask)


@triton.jit
def backward(
    q,
    k,
    v,
    g,
    beta,
    resets,
    saved,
    dy,
    dlast,
    scratch,
    errors,
    dq,
    dk,
    dv,
    dg,
    dbeta,
    dfirst,
    q_stride,
    k_stride,
    v_stride,
    dy_stride,
    length,
    heads,
    n_keys,
    width,
    stretches,
    stretch_steps,
    slot,
    part,
    PER_CHANNEL: tl.constexpr,
    GROUP: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
):
    """scratch (groups of a stretch, b h n p) and errors (b h steps of a stretch, p) take S~ and d. Unfinished sums:
    dq, dk, dg (block b l h n), dbeta and dg of one decay per head (block b l h), with `part` elements per block."""
    b, h, block, p, own = place(heads, width, P)
    n = tl.arange(0, N)
    own_n = n < n_keys
    slot, part = slot + 0 * b, part + 0 * b  # 64 bits
    mask = own_n[:, None] & own[None, :]
    state_at = ((b * heads + h) * n_keys + n[:, None]) * width + p[None, :]
    errors += (b * heads + h) * stretch_steps * width
    G = tl.zeros([N, P], tl.float32)
    if dlast is not None:
        G = tl.load(dlast + state_at, mask, 0.0)
    for s in range(stretches):
        start = (stretches - 1 - s) * stretch_steps + 0 * b
        steps = tl.minimum(stretch_steps, length - (stretches - 1 - s) * stretch_steps)
        S = tl.load(saved + (stretches - 1 - s) * slot + state_at, mask, 0.0)
        for i in range(steps):
            t = start + i
            token = (b * length + t) * heads + h
            k_t = _vector(k, k_stride, b, t, h, n, own_n)
            S *= _decay(g, resets, b, token, t, length, n, own_n, n_keys, PER_CHANNEL)[:, None]
            if i % GROUP == 0:
                tl.store(scratch + i // GROUP * slot + state_at, S, mask)
            error = _vector(v, v_stride, b, t, h, p, own) - tl.sum(S * k_t[:, None], 0)
            tl.store(errors + i * width + p, error, own)
            S += k_t[:, None] * (error * tl.load(beta + token))[None, :]
        tl.debug_barrier()  # other threads read them
        for j in range(steps):
            i = steps - 1 - j
            S = tl.load(scratch + i // GROUP * slot + state_at, mask, 0.0)
            for m in range(i // GROUP * GROUP, i):
                t = start + m
                token = (b * length + t) * heads + h
                u = tl.load(errors + m * width + p, own, 0.0) * tl.load(beta + token)
                S += _vector(k, k_stride, b, t, h, n, own_n)[:, None] * u[None, :]
                S *= _decay(g, resets, b, token + heads, t + 1, length, n, own_n, n_keys, PER_CHANNEL)[:, None]
            t = start + i
            token = (b * length + t) * heads + h
            q_t, k_t = _vector(q, q_stride, b, t, h, n, own_n), _vector(k, k_stride, b, t, h, n, own_n)
            dy_t, beta_t = _vector(dy, dy_stride, b, t, h, p, own), tl.load(beta + token)
            error = tl.load(errors + i * width + p, own, 0.0)
            u = beta_t * error
            G += q_t[:, None] * dy_t[None, :]
            du = tl.sum(G * k_t[:, None], 0)
            dv_t = beta_t * du
            at = (block * part + token) * n_keys + n
            tl.store(dq + at, tl.sum(S * dy_t[None, :], 1) + k_t * tl.sum(u * dy_t), own_n)
            tl.store(dk + at, tl.sum(G * u[None, :] - S * dv_t[None, :], 1), own_n)
            tl.store(dv + token * width + p, dv_t.to(dv.dtype.element_ty), own)
            tl.store(dbeta + block * part + token, tl.sum(du * error))
            G -= k_t[:, None] * dv_t[None, :]
            if PER_CHANNEL:
                tl.store(dg + at, tl.sum(G * S, 1), own_n)
            else:
                tl.store(dg + block * part + token, tl.sum(G * S))
            G *= _decay(g, resets, b, token, t, length, n, own_n, n_keys, PER_CHANNEL)[:, None]
        tl.debug_barrier()  # before the scratch is written again
    if dfirst is not None:
        tl.store(dfirst + state_at, G.to(dfirst.dtype.element_ty), mask)
