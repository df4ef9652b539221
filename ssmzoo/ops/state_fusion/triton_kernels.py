"""The fusion of states on a GPU, y = sum of 25 taps, and with it what Spatial-Mamba makes of the result: C y + D u.

Maps (b c h w) come with any strides; a program takes a tile of E channels and P positions of the row-major map. The
border's values go on outside, so that a position outside is read at the nearest one inside. `weight` (c 27) holds the
taps of the dilations 1, 3, 5; the three centres coincide. Each element is written by one program.
"""

import triton
import triton.language as tl


@triton.jit
def _place(height, width, channels, E: tl.constexpr, P: tl.constexpr):
    """(sequence, block of channels, block of positions, channels (E), rows, columns (P), which exist (E), (P))."""
    tiles, blocks = tl.cdiv(height * width, P), tl.cdiv(channels, E)
    program = tl.program_id(0)
    tile, block = program % tiles, program // tiles % blocks
    c, p = block * E + tl.arange(0, E), tile * P + tl.arange(0, P)
    b = (program // (tiles * blocks)).to(tl.int64)
    return b, block, tile, c.to(tl.int64), p // width, p % width, c < channels, p < height * width


@triton.jit
def _map(base, stride, b, c, i, j, mask):
    """(E P) in fp32, zeros outside the mask."""
    at = (i.to(tl.int64) * stride[2] + j.to(tl.int64) * stride[3])[None, :]
    return tl.load(base + b * stride[0] + c[:, None] * stride[1] + at, mask, 0.0).to(tl.float32)


@triton.jit
def _store_map(base, stride, b, c, i, j, value, mask):
    at = (i.to(tl.int64) * stride[2] + j.to(tl.int64) * stride[3])[None, :]
    tl.store(base + b * stride[0] + c[:, None] * stride[1] + at, value.to(base.dtype.element_ty), mask)


@triton.jit
def _plane(base, stride, b, i, j, mask):
    """(P) of a map without channels in fp32."""
    at = b * stride[0] + i.to(tl.int64) * stride[1] + j.to(tl.int64) * stride[2]
    return tl.load(base + at, mask, 0.0).to(tl.float32)


@triton.jit
def _tap(x, x_stride, b, c, i, j, k, height, width, mask):
    """(E P): what tap k of every position sees."""
    dilation = 2 * (k // 9) + 1
    row = tl.minimum(tl.maximum(i + dilation * (k % 9 // 3 - 1), 0), height - 1)
    column = tl.minimum(tl.maximum(j + dilation * (k % 3 - 1), 0), width - 1)
    return _map(x, x_stride, b, c, row, column, mask)


@triton.jit
def forward(
    x,
    weight,
    C,
    D,
    u,
    y,
    x_stride,
    C_stride,
    u_stride,
    y_stride,
    height,
    width,
    channels,
    E: tl.constexpr,
    P: tl.constexpr,
):
    b, block, tile, c, i, j, own, inside = _place(height, width, channels, E, P)
    mask = own[:, None] & inside[None, :]
    total = tl.zeros([E, P], tl.float32)
    for k in tl.static_range(27):
        total += tl.load(weight + c * 27 + k, own, 0.0)[:, None] * _tap(x, x_stride, b, c, i, j, k, height, width, mask)
    if C is not None:
        total *= _plane(C, C_stride, b, i, j, inside)[None, :]
        total += tl.load(D + c, own, 0.0)[:, None] * _map(u, u_stride, b, c, i, j, mask)
    _store_map(y, y_stride, b, c, i, j, total, mask)


@triton.jit
def backward_weights(
    dy,
    x,
    weight,
    C,
    D,
    u,
    dweight,
    dC,
    dD,
    du,
    dy_stride,
    x_stride,
    C_stride,
    u_stride,
    du_stride,
    height,
    width,
    channels,
    E: tl.constexpr,
    P: tl.constexpr,
):
    """du, and sums that the caller completes: dweight (b tile c 27), dC (block b h w), dD (b tile c)."""
    b, block, tile, c, i, j, own, inside = _place(height, width, channels, E, P)
    mask = own[:, None] & inside[None, :]
    given = _map(dy, dy_stride, b, c, i, j, mask)
    through = given
    if C is not None:
        through = given * _plane(C, C_stride, b, i, j, inside)[None, :]
    fused = tl.zeros([E, P], tl.float32)
    sums = (b * tl.cdiv(height * width, P) + tile) * channels + c
    for k in tl.static_range(27):
        seen = _tap(x, x_stride, b, c, i, j, k, height, width, mask)
        tl.store(dweight + sums * 27 + k, tl.sum(through * seen, 1), own)
        if C is not None:
            fused += tl.load(weight + c * 27 + k, own, 0.0)[:, None] * seen
    if C is not None:
        at = (block * (tl.num_programs(0) // (tl.cdiv(height * width, P) * tl.cdiv(channels, E))) + b) * height + i
        tl.store(dC + at * width + j, tl.sum(given * fused, 0), inside)
        tl.store(dD + sums, tl.sum(given * _map(u, u_stride, b, c, i, j, mask), 1), own)
        _store_map(du, du_stride, b, c, i, j, given * tl.load(D + c, own, 0.0)[:, None], mask)


@triton.jit
def backward_inputs(
    dy,
    weight,
    C,
    dx,
    dy_stride,
    C_stride,
    dx_stride,
    height,
    width,
    channels,
    E: tl.constexpr,
    P: tl.constexpr,
):
    """The gradient of the map with five rows and columns more on every side, (b c h+10 w+10): each position gathers
    from the outputs that saw it."""
    b, block, tile, c, i, j, own, inside = _place(height + 10, width + 10, channels, E, P)
    total = tl.zeros([E, P], tl.float32)
    for k in tl.static_range(27):
        dilation = 2 * (k // 9) + 1
        row, column = i - 5 - dilation * (k % 9 // 3 - 1), j - 5 - dilation * (k % 3 - 1)
        seen = inside & (row >= 0) & (row < height) & (column >= 0) & (column < width)
        grad = _map(dy, dy_stride, b, c, row, column, own[:, None] & seen[None, :])
        if C is not None:
            grad *= _plane(C, C_stride, b, row, column, seen)[None, :]
        total += tl.load(weight + c * 27 + k, own, 0.0)[:, None] * grad
    _store_map(dx, dx_stride, b, c, i, j, total, own[:, None] & inside[None, :])
