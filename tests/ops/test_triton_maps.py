"""Triton kernels of maps and of dense scans in Triton's interpreter, and models trained on all kernels for a step.

As test_triton.py: one test runs this file in a process of its own.
"""

import functools

import against_reference as checks
import pytest
import torch
from against_reference import rounding
from interpreted import interpret, interpreted, outside, set_sizes

import ssmzoo
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
        (selective_scan, dict(CHANNELS=2, STEPS=4)),
        (dense_scan, dict(TILE=32, PARTS=2)),
        (state_fusion, dict(TILE=64, CHANNELS=2)),
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
    "case", [dict(flags=True), dict(b=2, l=9, n=6, s=3), dict(b=1, l=1, n=2, s=1), dict(b=5, l=4, n=2)], ids=str
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
        with pytest.raises(ops.BackendError, match="parallel=True asks for products"):
            ops.dense_scan(**call, parallel=True)


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
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_at_the_ends_only(dtype):
    limits = dict(out=rounding(dtype, 2), grad=rounding(dtype, 4))  # the interpreter rounds towards zero: twice as far
    assert_close(functools.partial(_joined, ops.state_fusion), fusion_call(c=1, h=3, dtype=dtype), **limits)
    assert_close(ops.dense_scan, dense_call(dtype=dtype), **limits)


@interpreted
def test_runs_repeat_bit_by_bit():
    for function, call in (
        (ops.dense_scan, dense_call()),
        (ops.cross_selective_scan, cross_call(b=1)),
        (functools.partial(_joined, ops.state_fusion), fusion_call(c=1, h=3)),
    ):
        first, second = (checks.run(function, "triton", call) for _ in range(2))
        assert all(torch.equal(x, y) for xs, ys in zip(first, second) for x, y in zip(xs, ys))


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
    with ops.backend("triton"):
        far_apart = ops.selective_scan_fn(u, delta, A, B, B)
        taps = ops.causal_conv1d_fn(u, torch.ones(2, 2))
        fused = ops.state_fusion(u.unflatten(2, (2, 2)), kernels(2), torch.ones(3))
    with ops.backend("torch"):
        near = u.clone(memory_format=torch.contiguous_format)
        torch.testing.assert_close(far_apart, ops.selective_scan_fn(near, delta, A, B, B), rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(taps, ops.causal_conv1d_fn(near, torch.ones(2, 2)), rtol=2e-2, atol=2e-2)
    assert fused.isfinite().all()


TOYS = {  # model: arguments, operators that its GPU kernels serve
    "mamba": (dict(vocab_size=16, d_model=4, n_layer=1), "selective_scan_fn causal_conv1d_fn"),
    "mamba2": (
        dict(vocab_size=16, d_model=8, n_layer=1, ssm_cfg=dict(d_state=4, headdim=8)),
        "mamba_chunk_scan_combined causal_conv1d_fn",
    ),
    "vmamba": (
        dict(in_chans=1, num_classes=3, depths=[1], dims=4, mlp_ratio=1.0, drop_path_rate=0.0),
        "cross_selective_scan",
    ),
    "spatial_mamba": (
        dict(in_chans=1, num_classes=3, depths=[1], embed_dim=4, mlp_ratio=1.0, drop_path_rate=0.0),
        "spatial_scan",
    ),
    "sd_ssm": (dict(input_size=3, num_classes=2, state_size=4, num_transition_matrices=2), "dense_scan"),
    "mambair": (dict(in_chans=1, embed_dim=4, depths=[1], d_state=2, squeeze_factor=2), "cross_selective_scan"),
}


def losses(name: str, arguments: dict, backend: str | None) -> list[float]:
    """Of two batches, with a step of training between."""
    torch.manual_seed(0)
    model = ssmzoo.create_model(name, **arguments)
    optimizer, found = torch.optim.SGD(model.parameters(), lr=0.1), []
    for _ in range(2):
        if name in ("mamba", "mamba2", "sd_ssm"):
            batch = torch.randint(arguments.get("input_size", 16), (1, 5))
        else:
            batch = torch.randn(1, 1, 6, 8) if name == "mambair" else torch.randn(1, 1, 12, 16)
        with ops.backend(backend):
            out = model(batch)
            loss = getattr(out, "logits", out[0] if isinstance(out, tuple) else out).square().mean()
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@interpreted
@pytest.mark.parametrize("name", TOYS)
def test_models_train_as_on_the_cpu(name):
    arguments, operators = TOYS[name]

    def look(operator, call, *args, **kwargs):
        assert ops.chosen_backend(ops.OPERATORS[operator], *args, **kwargs) == "triton"
        return call(*args, **kwargs)

    with ops.observe(**{operator: functools.partial(look, operator) for operator in operators.split()}):
        by_kernels = losses(name, arguments, None)
    assert by_kernels == pytest.approx(losses(name, arguments, "torch"), rel=1e-4)
