"""The dense scan of symbols on a GPU: h_t = T_t h_{t-1} + x_t, T_t being one of s matrices (n n).

A program takes R sequences from their first step to their last, each state (n) in registers; transitions are gathered
step by step and stay in the cache, since all sequences share them. Codes are those of `step_codes`: a symbol, with the
flags SKIP (the state stays) and RESET (it is 0 before this step).

Few and long strings are cut into stretches of time that are walked at once: `products` multiplies the transitions of a
stretch, `forward` walks it from zero, then walks over the stretches with their products for transitions, which gives
the state before each, and then walks every stretch from there. The backward does the same.

Gradients: g_t = dh_t + T_{t+1}' g_{t+1} is the same walk backwards; dT_s is the sum of g_t h_{t-1}' over the steps of
symbol s, which `transitions` takes from a list sorted by symbol. Each element is written by one program.
"""

import triton
import triton.language as tl


@triton.jit
def _codes(codes, row, t, length, own, SKIP: tl.constexpr, RESET: tl.constexpr):
    """(symbols, skipped, reset), (R) each."""
    code = tl.load(codes + row * length + t, own, SKIP)
    return (code & (SKIP - 1)).to(tl.int64), (code & SKIP) != 0, (code & RESET) != 0


@triton.jit
def _transitions(T, symbol, valid, n, N: tl.constexpr):
    """(R N N): row, column."""
    i, j = tl.arange(0, N)[None, :, None], tl.arange(0, N)[None, None, :]
    offsets = symbol[:, None, None] * (n * n) + i * n + j
    return tl.load(T + offsets, valid[:, None, None] & (i < n) & (j < n), 0.0, cache_modifier=".ca")


@triton.jit
def forward(
    T,
    x,
    codes,
    first,
    states,
    last,
    batch,
    length,
    n,
    symbols,
    KEEP: tl.constexpr,
    SKIP: tl.constexpr,
    RESET: tl.constexpr,
    R: tl.constexpr,
    N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    i, own = tl.arange(0, N), row < batch
    mask = own[:, None] & (i < n)[None, :]
    h = tl.load(first + row[:, None] * n + i[None, :], mask, 0.0)
    for t in range(length):
        symbol, skip, reset = _codes(codes, row, t, length, own, SKIP, RESET)
        M = _transitions(T, symbol, own & (symbol < symbols) & (skip == 0), n, N)
        at = (row * length + t)[:, None] * n + i[None, :]
        h = tl.where(reset[:, None], 0.0, h)
        x_t = tl.where((symbol < symbols)[:, None], tl.load(x + at, mask, 0.0), float("nan"))  # no such symbol
        h = tl.where(skip[:, None], h, tl.sum(M * h[:, None, :], 2) + x_t)
        if KEEP:
            tl.store(states + at, h, mask)
    tl.store(last + row[:, None] * n + i[None, :], h, mask)


@triton.jit
def backward(
    T,
    codes,
    dstates,
    dlast,
    dx,
    dfirst,
    batch,
    length,
    n,
    symbols,
    SKIP: tl.constexpr,
    RESET: tl.constexpr,
    R: tl.constexpr,
    N: tl.constexpr,
):
    """dx, the gradient of every state including what comes through later ones (0 where skipped), and dfirst."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    i, own = tl.arange(0, N), row < batch
    mask = own[:, None] & (i < n)[None, :]
    g = tl.load(dlast + row[:, None] * n + i[None, :], mask, 0.0)
    for k in range(length):
        t = length - 1 - k
        symbol, skip, reset = _codes(codes, row, t, length, own, SKIP, RESET)
        M = _transitions(T, symbol, own & (symbol < symbols) & (skip == 0), n, N)
        at = (row * length + t)[:, None] * n + i[None, :]
        if dstates is not None:
            g += tl.load(dstates + at, mask, 0.0)
        tl.store(dx + at, tl.where(skip[:, None], 0.0, g), mask)
        g = tl.where(skip[:, None], g, tl.sum(M * g[:, :, None], 1))
        g = tl.where(reset[:, None], 0.0, g)
    tl.store(dfirst + row[:, None] * n + i[None, :], g, mask)


@triton.jit
def products(
    T,
    codes,
    product,
    batch,
    length,
    n,
    symbols,
    SKIP: tl.constexpr,
    RESET: tl.constexpr,
    N: tl.constexpr,
    J: tl.constexpr,
):
    """product (b n n): T_l ... T_1 of each row of codes; a program has J columns of it."""
    blocks = tl.cdiv(n, J)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    i, j = tl.arange(0, N), tl.program_id(0) % blocks * J + tl.arange(0, J)
    inside = (i < n)[:, None] & (i < n)[None, :]
    H = (i[:, None] == j[None, :]).to(tl.float32)
    for t in range(length):
        code = tl.load(codes + row * length + t)
        symbol = tl.minimum(code & (SKIP - 1), symbols - 1).to(tl.int64)  # an unknown one has made x NaN
        if (code & RESET) != 0:
            H = tl.zeros([N, J], tl.float32)
        if (code & SKIP) == 0:
            at = symbol * n * n + i[:, None] * n + i[None, :]
            M = tl.load(T + at, inside, 0.0, cache_modifier=".ca")
            H = tl.dot(M, H, input_precision="ieee")
    at = row * n * n + i[:, None] * n + j[None, :]
    tl.store(product + at, H, (i < n)[:, None] & (j < n)[None, :])


@triton.jit
def transitions(
    order, bounds, g, states, first, dT, length, n, symbols, parts, K: tl.constexpr, I: tl.constexpr, N: tl.constexpr
):
    """dT (part s n n): the sum of g_t h_{t-1}' over one part of the steps of symbol s, which `order` lists from
    bounds[s] to bounds[s + 1]; a program has I rows of it."""
    blocks = tl.cdiv(n, I)
    block, part, symbol = (
        tl.program_id(0) % blocks,
        tl.program_id(0) // blocks % parts,
        tl.program_id(0) // (blocks * parts),
    )
    begin, end = tl.load(bounds + symbol), tl.load(bounds + symbol + 1)
    share = tl.cdiv(end - begin, parts)
    begin += part * share
    end = tl.minimum(begin + share, end)
    i, j = block * I + tl.arange(0, I), tl.arange(0, N)
    total = tl.zeros([I, N], tl.float32)
    for start in range(begin, end, K):
        k = start + tl.arange(0, K)
        at = tl.load(order + k, k < end, 0)
        own, new = (k < end)[:, None], (at % length == 0)[:, None]
        mask = own & (j < n)[None, :]
        g_t = tl.load(g + at[:, None] * n + i[None, :], own & (i < n)[None, :], 0.0)
        h = tl.load(states + (at - 1)[:, None] * n + j[None, :], mask & (new == 0), 0.0)
        h += tl.load(first + (at // length)[:, None] * n + j[None, :], mask & new, 0.0)
        total += tl.dot(tl.trans(g_t), h, input_precision="ieee")
    at = ((part * symbols + symbol).to(tl.int64) * n + i)[:, None] * n + j[None, :]
    tl.store(dT + at, total, (i < n)[:, None] & (j < n)[None, :])
