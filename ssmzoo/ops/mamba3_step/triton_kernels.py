"""The recurrence of one token of Mamba-3 on a GPU: a program per head of a sequence."""

import triton
import triton.language as tl

from ssmzoo.ops.triton.functions import silu, softplus


@triton.jit
def _normed(row, weight, bias, n, states, eps):
    """RMSNorm(row) weight + bias at the states n and, beside each, its neighbour in a pair: what a rotation takes."""
    v = tl.load(row + n, n < states, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(v * v, 0) / states + eps)
    v *= scale * tl.load(weight + n, n < states, 0.0).to(tl.float32)
    v += tl.load(bias + n, n < states, 0.0).to(tl.float32)
    m, there = n ^ 1, (n ^ 1) < states
    w = tl.load(row + m, there, 0.0) * scale * tl.load(weight + m, there, 0.0).to(tl.float32)
    return v, w + tl.load(bias + m, there, 0.0).to(tl.float32)


@triton.jit
def advance(
    projected,
    dt_bias,
    B_norm,
    C_norm,
    B_bias,
    C_bias,
    D,
    norm_weight,
    phase,
    state,
    last_k,
    last_x,
    new_phase,
    after,
    new_k,
    new_x,
    out,
    heads,
    width,
    states,
    groups,
    angles,
    A_floor,
    B_eps,
    C_eps,
    eps,
    P: tl.constexpr,
    ALL: tl.constexpr,
    N: tl.constexpr,
):
    """y (b e) of projected (b 2e+2gn+3h+m) = [z, x, B, C, dt, a, trap, angle]; new states may be the ones given."""
    h, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    n, e = tl.arange(0, N), heads * width
    of_head, known = b * heads + h, n < states
    row = projected + b * (2 * e + 2 * groups * states + 3 * heads + angles)
    shared = row + 2 * e + h // (heads // groups) * states
    steps = row + 2 * e + 2 * groups * states + h
    dt = softplus(tl.load(steps) + tl.load(dt_bias + h).to(tl.float32))
    a = tl.load(steps + heads)
    rate = tl.where(a >= 0, 1 + a, 1 / (1 - tl.minimum(a, 0.0)))
    decay = tl.exp(-dt * tl.maximum(rate, A_floor))
    lam = 1 / (1 + tl.exp(-tl.load(steps + 2 * heads)))
    pair = n // 2
    turned = pair < angles
    angle = tl.load(row + 2 * e + 2 * groups * states + 3 * heads + pair, turned, 0.0)
    tanh = 1 - 2 / (tl.exp(2 * angle) + 1)
    theta = tl.load(phase + of_head * angles + pair, turned, 0.0) + dt * (3.141592653589793 * tanh)
    theta -= tl.floor(theta / 6.283185307179586) * 6.283185307179586
    cos, sin = tl.cos(theta), tl.sin(theta)  # 1 and 0 where nothing turns
    sin = tl.where(n % 2 == 0, -sin, sin)
    k, k_beside = _normed(shared, B_norm, B_bias + h * states, n, states, B_eps)
    q, q_beside = _normed(shared + groups * states, C_norm, C_bias + h * states, n, states, C_eps)
    k, q = k * cos + k_beside * sin, q * cos + q_beside * sin
    k_before = tl.load(last_k + of_head * states + n, known, 0.0).to(tl.float32)
    skip, channels = tl.load(D + h).to(tl.float32), tl.arange(0, P)
    tl.debug_barrier()  # everything of the head is read before it is overwritten
    tl.store(new_phase + of_head * angles + pair, theta, turned & known & (n % 2 == 0))
    tl.store(new_k + of_head * states + n, k.to(new_k.dtype.element_ty), known)
    for start in range(0, width, P):
        p = start + channels
        own = p < width
        mask = own[:, None] & known[None, :]
        x = tl.load(row + e + h * width + p, own, 0.0)
        x_before = tl.load(last_x + of_head * width + p, own, 0.0).to(tl.float32)
        at = (of_head * width + p)[:, None] * states + n[None, :]
        S = tl.load(state + at, mask, 0.0).to(tl.float32) + ((1 - lam) * dt * x_before)[:, None] * k_before[None, :]
        S = decay * S + (lam * dt * x)[:, None] * k[None, :]
        tl.store(after + at, S.to(after.dtype.element_ty), mask)
        tl.store(out + b * e + h * width + p, tl.sum(S * q[None, :], 1) + skip * x, own)
        tl.debug_barrier()  # x_before is read
        tl.store(new_x + of_head * width + p, x.to(new_x.dtype.element_ty), own)
    tl.debug_barrier()  # before other threads read y
    p = tl.arange(0, ALL)
    own = p < width
    y = tl.load(out + b * e + h * width + p, own, 0.0)
    if norm_weight is not None:
        y *= tl.load(norm_weight + h * width + p, own, 0.0).to(tl.float32) / tl.sqrt(tl.sum(y * y, 0) / width + eps)
    y *= silu(tl.load(row + h * width + p, own, 0.0))
    tl.debug_barrier()
    tl.store(out + b * e + h * width + p, y, own)
