"""The delta rule of one token on a GPU: a program per head of a sequence, channels of the values P at a time."""

import triton
import triton.language as tl

from ssmzoo.ops.triton.functions import silu, softplus


@triton.jit
def advance(
    qkv,
    gate,
    beta,
    decay,
    A_log,
    dt_bias,
    norm_weight,
    state,
    after,
    out,
    qkv_stride,
    gate_stride,
    beta_stride,
    decay_stride,
    heads,
    per_group,
    keys,
    width,
    q_scale,
    beta_scale,
    length_eps,
    eps,
    PER_CHANNEL: tl.constexpr,
    P: tl.constexpr,
    ALL: tl.constexpr,
    N: tl.constexpr,
):
    """y (b hp) of qkv (b jn+jn+hp) behind the convolution, gate (b hp), beta (b h), decay (b h) or (b hn); `after` may
    be `state` (b h n p). A head's decay, or, PER_CHANNEL, one of each channel of its key and the sigmoid as gate."""
    h, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    n, all_keys = tl.arange(0, N), heads // per_group * keys
    known = n < keys
    row = qkv + b * qkv_stride
    own_key = row + h // per_group * keys + n
    q, k = tl.load(own_key, known, 0.0), tl.load(own_key + all_keys, known, 0.0)
    q /= tl.sqrt(tl.sum(q * q, 0) + length_eps)
    k /= tl.sqrt(tl.sum(k * k, 0) + length_eps)
    q *= q_scale
    rate = tl.exp(tl.load(A_log + h).to(tl.float32))
    if PER_CHANNEL:
        step = tl.load(decay + b * decay_stride + h * keys + n, known, 0.0)
        step += tl.load(dt_bias + h * keys + n, known, 0.0).to(tl.float32)
        kept = tl.exp(-rate * softplus(step))[:, None]
    else:
        step = tl.load(decay + b * decay_stride + h) + tl.load(dt_bias + h).to(tl.float32)
        kept = tl.exp(-rate * softplus(step))
    strength = beta_scale / (1 + tl.exp(-tl.load(beta + b * beta_stride + h)))
    squares = tl.zeros([P], tl.float32)
    for start in range(0, width, P):
        p = start + tl.arange(0, P)
        own = p < width
        mask = known[:, None] & own[None, :]
        at = ((b * heads + h) * keys + n)[:, None] * width + p[None, :]
        S = kept * tl.load(state + at, mask, 0.0).to(tl.float32)
        v = tl.load(row + 2 * all_keys + h * width + p, own, 0.0)
        error = strength * (v - tl.sum(k[:, None] * S, 0))
        S += k[:, None] * error[None, :]
        tl.store(after + at, S.to(after.dtype.element_ty), mask)
        o = tl.sum(q[:, None] * S, 0)
        squares += o * o
        tl.store(out + (b * heads + h) * width + p, o, own)
    tl.debug_barrier()  # before other threads read o
    p = tl.arange(0, ALL)
    own = p < width
    y = tl.load(out + (b * heads + h) * width + p, own, 0.0)
    y *= tl.load(norm_weight + p, own, 0.0).to(tl.float32) / tl.sqrt(tl.sum(squares, 0) / width + eps)
    g = tl.load(gate + b * gate_stride + h * width + p, own, 0.0)
    if PER_CHANNEL:
        y /= 1 + tl.exp(-g)
    else:
        y *= silu(g)
    tl.debug_barrier()
    tl.store(out + (b * heads + h) * width + p, y, own)
