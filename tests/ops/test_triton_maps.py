"""Triton kernels of maps and of dense scans in Triton's interpreter.

As test_triton.py: one test runs this file in a process of its own.
"""

import functools

import against_reference as checks
import pytest
import torch
from interpreted import interpret, interpreted, outside, set_sizes

from ssmzoo import ops
from ssmzoo.ops.triton import MISSING

if MISSING is not None:
    pytest.skip(MISSING, allow_module_level=True)
assert_close = functools.partial(checks.assert_close, backend="triton")


@outside
def test_all_of_this_file_through_the_interpreter():
    interpret(__file__)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles and chunks at sizes that an interpreter can do."""
    from ssmzoo.ops.dense_scan import triton as dense_scan
    from ssmzoo.ops.selective_scan import triton as selective_scan
    from ssmzoo.ops.state_fusion import triton as state_fusion

    set_sizes(
        monkeypatch,
        (selective_scan, dict(CHANNELS=2, STEPS=8)),
        (dense_scan, dict(TILE=32, PARTS=2, GRADIENT=512)),
        (state_fusion, dict(TILE=128, CHANNELS=2)),
    )


def dense_call(b=3, l=7, n=3, s=4, k=2, flags=False, dtype=torch.float32):
    call = dict(
        A_dict=torch.randn(n, n, k),
        weights=torch.softmax(torch.randn(s, k), -1),
        inputs=torch.randn(b, l, n).to(dtype),
        symbols=torch.randint(s, (b, l)),
        initial_state=torch.randn(b, n),
        p_norm=1.2,
    )
    if flags:
        call |= dict(mask=torch.rand(b, l) < 0.7, seq_idx=(torch.rand(b, l) < 0.3).cumsum(1))
    return call


@interpreted
@pytest.mark.parametrize(
    "case",
    [dict(flags=True), dict(b=2, l=9, n=6, s=3), dict(b=1, l=1, n=2, s=1), dict(b=5, l=4, n=2), dict(b=1, l=3, n=17)],
    ids=str,
)
def test_dense_scan_against_reference(case):
    assert_close(ops.dense_scan, dense_call(**case))


@interpreted
def test_dense_scan_of_the_last_step_and_of_what_it_refuses():
    call = dense_call()
    call["inputs"] = torch.randn(4, 3)  # one for each symbol
    assert_close(ops.dense_scan, call | dict(all_steps=False))
    with ops.backend("triton"):
        with pytest.raises(IndexError, match="symbols reach"):
            ops.dense_scan(**call | dict(symbols=call["symbols"] + 3))
        wide = torch.randn(65, 65, 1), torch.ones(1, 1), torch.randn(1, 9, 65), 1.0, torch.zeros(1, 9, dtype=torch.long)
        with pytest.raises(ops.BackendError, match="products of transitions.*up to 64 states, got 65"):
            ops.dense_scan(*wide, parallel=True)


@interpreted
@pytest.mark.parametrize("case", [dict(b=2, l=9, flags=True), dict(b=1, l=16, n=2, s=1), dict(b=3, l=3)], ids=str)
def test_stretches_of_long_strings_are_walked_at_once(monkeypatch, case):
    from ssmzoo.ops.dense_scan import triton as launcher

    call = dense_call(**case)
    assert_close(ops.dense_scan, call | dict(parallel=True))
    monkeypatch.setattr(launcher, "LONG", 1)
    with ops.backend("triton"), torch.no_grad():  # by itself, and keeping no states
        got = ops.dense_scan(**call, all_steps=False)
    with ops.backend("torch"):
        torch.testing.assert_close(got, ops.dense_scan(**call, all_steps=False))


def cross_call(b=2, e=3, h=3, w=4, n=2, r=2, channels_last=False, scans="cross", dtype=torch.float32):
    x = torch.randn(b, h, w, e).permute(0, 3, 1, 2) if channels_last else torch.randn(b, e, h, w)
    call = dict(
        x=x.to(dtype),
        x_proj=torch.randn(4, r + 2 * n, e),
        dt_proj=torch.randn(4, e, r),
        dt_bias=torch.randn(4, e),
        A=-torch.rand(4 * e, n),
        D=torch.randn(4 * e),
    )
    return call | dict(scans=scans)


@interpreted
@pytest.mark.parametrize(
    "case",
    [
        dict(channels_last=True),
        dict(b=1, h=5, w=2, n=1, r=1, scans="bidirectional"),
        dict(b=1, h=1, w=3, scans="unidirectional"),
    ],
    ids=str,
)
def test_cross_selective_scan_against_reference(case):
    assert_close(ops.cross_selective_scan, cross_call(**case))


@interpreted
def test_a_large_map_is_cut_into_segments(monkeypatch):
    from ssmzoo.ops.selective_scan import triton as launcher

    monkeypatch.setattr(launcher, "ENOUGH", 8)
    monkeypatch.setattr(launcher, "SHORTEST", 1)
    assert_close(ops.cross_selective_scan, cross_call(b=1, e=2, h=3, w=5, n=1, r=1))


def kernels(c):
    return tuple(torch.randn(c, 1, 3, 3) for _ in range(3))


def _joined(function, kernel0, kernel1, kernel2, **arguments):
    return function(**arguments, kernels=(kernel0, kernel1, kernel2))


def fusion_call(b=1, c=3, h=6, w=4, channels_last=False, dtype=torch.float32):
    x = torch.randn(b, h, w, c).permute(0, 3, 1, 2) if channels_last else torch.randn(b, c, h, w)
    return dict(x=x.to(dtype), alpha=torch.randn(3)) | {f"kernel{i}": k for i, k in enumerate(kernels(c))}


@interpreted
@pytest.mark.parametrize("case", [dict(), dict(b=2, h=3, channels_last=True), dict(c=1, h=1, w=1)], ids=str)
def test_state_fusion_against_reference(case):
    assert_close(functools.partial(_joined, ops.state_fusion), fusion_call(**case))


def spatial_call(b=1, h=2, w=3, e=3, r=2, dtype=torch.float32):
    call = dict(
        u=torch.randn(b, h, w, e).to(dtype),
        steps=torch.randn(b, h, w, r + 2).to(dtype),
        dt_proj=torch.randn(e, r),
        dt_bias=torch.randn(e),
        A=-torch.rand(e, 1),
        D=torch.randn(e),
        alpha=torch.randn(3),
    )
    return call | {f"kernel{i}": k for i, k in enumerate(kernels(e))}


@interpreted
def test_spatial_scan_against_reference():
    assert_close(functools.partial(_joined, ops.spatial_scan), spatial_call())


@interpreted
def test_offsets_beyond_32_bits():
    """Sequences of a view that lie 2^30 elements apart, the third beyond 2^31; the memory between is never touched."""
    far = 2**30 + 8
    try:
        memory = torch.empty(2 * far + 64, dtype=torch.bfloat16)  # pages are given when they are written
    except RuntimeError as error:
        pytest.skip(f"no 4 GB of addresses: {error}")
    u = memory.as_strided((3, 2, 4), (far, 4, 1))
    u.copy_(torch.randn(3, 2, 4))
    delta, A, B = torch.rand(3, 2, 4), -torch.ones(2, 1), torch.randn(3, 1, 4)
    taps, K, one, cross = torch.ones(2, 2), kernels(2), torch.ones(3), cross_call(b=3, e=2, h=2, w=2, n=1, r=1)
    cross = {name: t.bfloat16() if name in ("x_proj", "dt_proj") else t for name, t in cross.items()}
    k, step = torch.randn(3, 2, 1, 3), torch.rand(3, 2, 1)

    def results(u):
        map_, v = u.unflatten(2, (2, 2)), u.unsqueeze(2)  # (b c h w), (b l h p)
        ranks = k.unsqueeze(2)
        return [
            ops.selective_scan_fn(u, delta, A, B, B),
            ops.causal_conv1d_fn(u, taps),
            ops.state_fusion(map_, K, one),
            ops.cross_selective_scan(**cross | dict(x=map_)),
            ops.ssd_scan(v, -step, k, k)[0],
            ops.trapezoidal_scan(v, ranks, ranks, -step, step, step, one[:1])[0],
            ops.taylor_attention(k, k, v)[0],
            ops.gated_delta_rule(k, k, v, -step, step)[0],
        ]

    with ops.backend("triton"):
        far_apart = results(u)
    with ops.backend("torch"):
        near = results(u.clone(memory_format=torch.contiguous_format))
    for got, expected in zip(far_apart, near, strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)
