"""The recurrence of one token of Mamba-2 on a GPU: a program per channels of a head of a sequence (P N)."""

import triton
import triton.language as tl

from ssmzoo.ops.triton.functions import silu, softplus


@triton.jit
def advance(
    projected,
    dt_bias,
    A_log,
    D,
    state,
    after,
    out,
    heads,
    width,
    states,
    groups,
    dt_min,
    dt_max,
    D_OF_CHANNELS: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
):
    """y SiLU(z) (b e) of projected (b e+c+h) = [z, x, B, C, dt], x, B and C behind the convolution.

    e = heads width, c = e + 2 groups states; `after` may be `state` (b h p n)
    """
    p = tl.program_id(0).to(tl.int64) * P + tl.arange(0, P)
    h, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    n = tl.arange(0, N)
    own, known, e = p < width, n < states, heads * width
    row = projected + b * (2 * e + 2 * groups * states + heads)
    z = tl.load(row + h * width + p, own, 0.0)
    x = tl.load(row + e + h * width + p, own, 0.0)
    shared = row + 2 * e + h // (heads // groups) * states
    B = tl.load(shared + n, known, 0.0)
    C = tl.load(shared + groups * states + n, known, 0.0)
    dt = tl.load(row + 2 * e + 2 * groups * states + h) + tl.load(dt_bias + h).to(tl.float32)
    dt = tl.minimum(tl.maximum(softplus(dt), dt_min), dt_max)
    decay = tl.exp(-tl.exp(tl.load(A_log + h).to(tl.float32)) * dt)
    mask = own[:, None] & known[None, :]
    at = ((b * heads + h) * width + p)[:, None] * states + n[None, :]
    S = decay * tl.load(state + at, mask, 0.0).to(tl.float32) + (dt * x)[:, None] * B[None, :]
    tl.store(after + at, S.to(after.dtype.element_ty), mask)
    if D_OF_CHANNELS:
        skip = tl.load(D + h * width + p, own, 0.0).to(tl.float32)
    else:
        skip = tl.load(D + h).to(tl.float32)
    y = tl.sum(S * C[None, :], 1) + skip * x
    tl.store(out + b * e + h * width + p, y * silu(z), own)
