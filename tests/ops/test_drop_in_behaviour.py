"""Every argument of the functions that mamba-ssm and causal-conv1d have, by what it does: against the equations, one
token at a time in float64, on every backend, in several types and layouts, with arguments in upstream's order."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from against_reference import native
from tried import tried

from ssmzoo import ops

BACKENDS = ["reference", "torch", pytest.param("c", marks=native)]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
TYPES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
every_type = pytest.mark.parametrize("dtype", TYPES, ids=lambda t: str(t).removeprefix("torch."))


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype)


def agree(got, expected, tolerance):
    tried("calls of drop-in functions against the equations")
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape
        assert (a.double() - b).norm() <= tolerance * (b.norm() + 1e-3)


def convolve(x, weight, bias, seq_idx, past, activation):
    """x (b c l); past (b c k-1) inputs before it."""
    b, c, l = x.shape
    k, weight = weight.shape[1], weight.double()
    seen, y = torch.cat([past.double(), x.double()], 2), torch.zeros(b, c, l, dtype=torch.float64)
    for i, t in itertools.product(range(b), range(l)):
        if seq_idx is not None and seq_idx[i, t] < 0:
            continue
        y[i, :, t] = 0 if bias is None else bias.double()
        for j in range(k):
            s = t - k + 1 + j
            if seq_idx is None or (s >= 0 and seq_idx[i, s] == seq_idx[i, t]):
                y[i, :, t] += weight[:, j] * seen[i, :, s + k - 1]
        y[i, :, t] = F.silu(y[i, :, t]) if activation in ("silu", "swish") else y[i, :, t]
    return y


@every_backend
@every_type
@pytest.mark.parametrize("taps", [2, 3, 4])
@pytest.mark.parametrize("channels_last", [False, True])
def test_causal_conv1d_fn(backend, dtype, taps, channels_last):
    for length, activation, with_bias in itertools.product((1, taps, 13), (None, "silu", "swish"), (False, True)):
        x = randn(2, 8, length, dtype=dtype)
        x = x.mT.contiguous().mT if channels_last else x
        weight, bias = randn(8, taps, dtype=dtype), randn(8, dtype=dtype) if with_bias else None
        seq_idx = torch.randint(-1, 3, (2, length), dtype=torch.int32).sort(1).values
        first, out = randn(2, 8, taps - 1, dtype=dtype), torch.full((2, 8, taps - 1), 9.0, dtype=dtype)
        with ops.backend(backend):
            packed = ops.causal_conv1d_fn(x, weight, bias, seq_idx, None, False, None, activation)
            carried, last = ops.causal_conv1d_fn(x, weight, bias, None, first, True, out, activation)
        assert packed.dtype == carried.dtype == last.dtype == dtype and last is out
        zero = torch.zeros_like(first)
        agree([packed], [convolve(x, weight, bias, seq_idx, zero, activation)], TYPES[dtype])
        right = convolve(x, weight, bias, None, first, activation)
        agree([carried, last], [right, torch.cat([first, x], 2)[..., 1 - taps :].double()], TYPES[dtype])


def advance(buffer, token, weight, bias, position):
    """One token (c) into a state (c s), shifted or, with a position, circular: (y, new state), all float64."""
    size, back = buffer.shape[1], weight.shape[1] - 1
    new = buffer.clone()
    if position is None:
        past = buffer[:, size - back :]
        new = torch.cat([buffer, token[:, None]], 1)[:, 1:]
    else:
        past = torch.stack([buffer[:, (position - j) % size] for j in range(back, 0, -1)], 1)
        new[:, position % size] = token
    return F.silu((torch.cat([past, token[:, None]], 1) * weight).sum(1) + bias), new


@every_backend
@pytest.mark.parametrize("circular", [False, True])
@pytest.mark.parametrize("indexed", [False, True])
def test_causal_conv1d_update(backend, circular, indexed):
    for size, taps, length in itertools.product((3, 5, 8), (2, 4), (None, 1, 3, 9)):
        x, weight, bias = randn(3, 6, length or 1), randn(6, taps), randn(6)
        state, rows = randn(7 if indexed else 3, 6, size), [5, -1, 2] if indexed else [0, 1, 2]
        seen = [0, 4, 11]
        expected, ys = state.double(), torch.zeros(x.shape, dtype=torch.float64)
        for i, row in enumerate(rows):
            for t in range(x.shape[2] if row >= 0 else 0):
                position = seen[i] + t if circular else None
                step = advance(expected[row], x[i, :, t].double(), weight.double(), bias.double(), position)
                ys[i, :, t], expected[row] = step
        given = x if length else x[..., 0]
        count = torch.tensor(seen, dtype=torch.int32) if circular else None
        indices = torch.tensor(rows, dtype=torch.int32) if indexed else None
        with ops.backend(backend):
            y = ops.causal_conv1d_update(given, state, weight, bias, "silu", count, indices)
        agree([y, state], [ys if length else ys[..., 0], expected], 1e-5)


@every_backend
@pytest.mark.parametrize("heads, groups", [(None, 1), (4, 1), (4, 2)])
@pytest.mark.parametrize("dtype, state_dtype", itertools.product((torch.float32, torch.bfloat16), repeat=2))
def test_selective_state_update(backend, heads, groups, dtype, state_dtype):
    channels, b, n = (6,) if heads is None else (heads, 6), 3, 5
    tolerance = 1e-5 if dtype == state_dtype == torch.float32 else 2e-2
    for with_D, with_z, with_bias, softplus, indexed in itertools.product((False, True), repeat=5):
        rows = [4, -1, 0] if indexed else [0, 1, 2]
        state = randn(6 if indexed else 3, *channels, n, dtype=state_dtype)
        x, dt, z = (randn(b, *channels, dtype=dtype) for _ in range(3))
        A, D, bias = -torch.rand(*channels, n), randn(*channels), randn(*channels)
        B, C = (randn(b, *(() if heads is None else (groups,)), n, dtype=dtype) for _ in range(2))
        D, z, bias = D if with_D else None, z if with_z else None, bias if with_bias else None
        expected, ys = state.double(), torch.zeros(b, *channels, dtype=torch.float64)
        for i, row in enumerate(rows):
            if row < 0:
                continue
            step = dt[i].double() + (0 if bias is None else bias.double())
            step = F.softplus(step) if softplus else step
            B_i, C_i = (M[i].double() for M in (B, C))
            if heads is not None:
                B_i, C_i = (M.repeat_interleave(heads // groups, 0)[:, None] for M in (B_i, C_i))
            xi = x[i].double()
            expected[row] = (step[..., None] * A.double()).exp() * expected[row] + (step * xi)[..., None] * B_i
            y = (expected[row] * C_i).sum(-1) + (0 if D is None else D.double() * xi)
            ys[i] = y if z is None else y * F.silu(z[i].double())
        indices = torch.tensor(rows, dtype=torch.int32) if indexed else None
        free = backend == "c" and state_dtype != torch.float32  # which the C kernel leaves to another
        with ops.backend(None if free else backend):
            y = ops.selective_state_update(state, x, dt, A, B, C, D, z, bias, softplus, indices)
        assert (y.dtype, state.dtype) == (dtype, state_dtype)
        agree([y, state], [ys, expected], tolerance)


@pytest.mark.parametrize("backend", ["reference", "torch", None])  # the C kernel leaves some strides to another
def test_states_that_are_views_and_values_that_heads_share(backend):
    """As upstream's decoding calls them: a slice of a larger cache, and time steps, A, D expanded with stride 0."""
    whole, x, B, C = randn(2, 3, 4, 6, 5), randn(2, 4, 6), randn(2, 1, 5), randn(2, 1, 5)
    dt, A = randn(2, 4)[..., None].expand(2, 4, 6), -torch.rand(4)[:, None, None].expand(4, 6, 5)
    D, bias = (randn(4)[:, None].expand(4, 6) for _ in range(2))
    before, alone = whole.clone(), whole[:, 1].clone()
    with ops.backend("reference"):
        right = ops.selective_state_update(
            alone, x, dt.contiguous(), A.contiguous(), B, C, D.contiguous(), None, bias.contiguous(), True
        )
    with ops.backend(backend):
        y = ops.selective_state_update(whole[:, 1], x, dt, A, B, C, D, None, bias, True)
    agree([y, whole[:, 1]], [right.double(), alone.double()], 1e-5)
    assert torch.equal(whole[:, [0, 2]], before[:, [0, 2]])
    cache, token, weight = randn(2, 3, 8, 6), randn(2, 6), randn(6, 4)
    before, alone = cache.clone(), cache[:, 1].mT.clone()
    with ops.backend("reference"):
        right = ops.causal_conv1d_update(token, alone, weight, None, "silu")
    with ops.backend(backend):
        y = ops.causal_conv1d_update(token, cache[:, 1].mT, weight, None, "silu")
    agree([y, cache[:, 1].mT], [right.double(), alone.double()], 1e-5)
    assert torch.equal(cache[:, [0, 2]], before[:, [0, 2]])


def scan(u, delta, A, B, C, D, z, bias, softplus):
    kind = torch.complex128 if A.is_complex() else torch.float64
    u, delta = u.double(), delta.double() + bias.double()[:, None]
    delta = F.softplus(delta) if softplus else delta
    b, e, l = u.shape
    h, ys = torch.zeros(b, e, A.shape[1], dtype=kind), []

    def at(M, t):
        if M.ndim == 2:
            return M.to(kind).expand(b, -1, -1)
        M = M.double()
        M = torch.view_as_complex(M.unflatten(-1, (-1, 2)).contiguous()) if A.is_complex() else M
        return M[:, None, :, t].expand(b, e, -1) if M.ndim == 3 else M[..., t].repeat_interleave(e // M.shape[1], 1)

    for t in range(l):
        step = delta[:, :, t, None]
        h = (step * A.to(kind)).exp() * h + step * u[:, :, t, None] * at(B, t)
        y = (h * at(C, t)).sum(-1)
        ys.append(2 * y.real if y.is_complex() else y)
    y = torch.stack(ys, 2) + (0 if D is None else D.double()[:, None] * u)
    return (y if z is None else y * F.silu(z.double())), h


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_selective_scan_fn(backend, dtype):
    scan_every_way(backend, dtype, False)


def test_selective_scan_fn_with_complex_A():
    """Which upstream takes in float32 only, and the reference serves here."""
    scan_every_way("reference", torch.float32, True)


def scan_every_way(backend, dtype, complex_A):
    b, e, n, l = 2, 6, 4, 11
    for kind_B, kind_C, with_D, with_z, softplus in itertools.product("cvg", "cvg", *[(False, True)] * 3):
        A, length = -torch.rand(e, n), 2 * l if complex_A else l
        A = torch.complex(A, randn(e, n)) if complex_A else A
        constant = torch.randn(e, n, dtype=A.dtype)
        kinds = {"c": (e, n), "v": (b, n, length), "g": (b, 2, n, length)}
        B, C = (constant if k == "c" else randn(*kinds[k], dtype=dtype) for k in (kind_B, kind_C))
        u, delta = randn(b, e, l, dtype=dtype), (torch.rand(b, e, l) / 2).to(dtype)
        D, z, bias = randn(e) if with_D else None, randn(b, e, l, dtype=dtype) if with_z else None, torch.rand(e)
        with ops.backend(backend):
            y, h = ops.selective_scan_fn(u, delta, A, B, C, D, z, bias, softplus, True)
        right, last = scan(u, delta, A, B, C, D, z, bias, softplus)
        assert y.dtype == dtype and h.dtype == (torch.complex64 if complex_A else torch.float32)
        pair = (torch.view_as_real(h), torch.view_as_real(last)) if complex_A else (h, last)
        agree([y, pair[0]], [right, pair[1]], 1e-4 if dtype == torch.float32 else 2e-2)


def chunk_scan(x, dt, A, B, C, D, z, bias, first, seq_idx, limit):
    b, l, h, _ = x.shape
    state = (
        torch.zeros(*x.shape[:1], h, x.shape[3], B.shape[3], dtype=torch.float64) if first is None else first.double()
    )
    dt, ys = F.softplus(dt.double() + bias.double()).clamp(*limit), []
    for t in range(l):
        if seq_idx is not None and t:
            state = torch.where((seq_idx[:, t] != seq_idx[:, t - 1]).view(b, 1, 1, 1), 0.0, state)
        B_t, C_t = (M[:, t].double().repeat_interleave(h // M.shape[2], 1) for M in (B, C))
        into = (dt[:, t, :, None] * x[:, t].double())[..., None] * B_t[:, :, None]
        state = (dt[:, t] * A.double()).exp()[..., None, None] * state + into
        y = (state * C_t[:, :, None]).sum(-1)
        skip = 0 if D is None else (D.double() if D.ndim == 2 else D.double()[:, None]) * x[:, t].double()
        ys.append(y + skip)
    y = torch.stack(ys, 1)
    return (y if z is None else y * F.silu(z.double())), state


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length, chunk", [(1, 16), (7, 4), (33, 16), (20, 256)])
def test_mamba_chunk_scan_combined(backend, dtype, length, chunk):
    b, h, p, g, n = 2, 4, 6, 2, 5
    for kind_D, with_z, first, packed, limited in itertools.product((None, "h", "hp"), *[(False, True)] * 4):
        x, dt, A = randn(b, length, h, p, dtype=dtype), randn(b, length, h, dtype=dtype), -torch.rand(h)
        B, C = (randn(b, length, g, n, dtype=dtype) for _ in range(2))
        D = {None: None, "h": randn(h), "hp": randn(h, p)}[kind_D]
        z, bias = randn(b, length, h, p, dtype=dtype) if with_z else None, randn(h)
        state = randn(b, h, p, n) if first else None
        seq_idx = torch.randint(0, 3, (b, length), dtype=torch.int32).sort(1).values if packed else None
        limit = (0.05, 0.4) if limited else (0.0, math.inf)
        with ops.backend(backend):
            y, last = ops.mamba_chunk_scan_combined(
                x, dt, A, B, C, chunk, D, z, bias, state, seq_idx, None, True, limit, True, False
            )
        assert y.dtype == dtype and last.dtype == torch.float32
        right = chunk_scan(x, dt, A, B, C, D, z, bias, state, seq_idx, limit)
        agree([y, last], right, 1e-4 if dtype == torch.float32 else 3e-2)
