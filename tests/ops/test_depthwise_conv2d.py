"""The depthwise convolution of maps on every backend against sums over taps in float64, with all that surrounds it."""

import pytest
import torch
from against_reference import BACKENDS, native
from hypothesis import given, settings
from hypothesis import strategies as st

from ssmzoo import ops
from ssmzoo.layers.image.fused import depthwise_conv, fused_depthwise
from ssmzoo.released.golden import relative_error

KINDS = [
    {},
    {"residual": True},
    {"act": "silu"},
    {"act": "silu", "stride": 2},
    {"act": "relu", "rectify": True},
    {"act": "relu", "rectify": True, "stride": 2},
]
SIZES = st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.sampled_from([1, 3, 16, 33, 70]))


def inputs(b, h, w, d, bias=True, kernel=3):
    return [torch.randn(b, h, w, d), torch.randn(d, 1, kernel, kernel), *([torch.randn(d)] if bias else [])]


def run(backend, values, dtype=torch.float32, **kind):
    """Value and gradients; the map is one half of a wider one."""
    x, *rest = [v.detach().to(dtype).requires_grad_() for v in values]
    with ops.backend(backend):
        y = ops.depthwise_conv2d(torch.cat([x, x + 1], dim=-1).chunk(2, dim=-1)[0], *rest, **kind)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    return [y, *torch.autograd.grad((y * weights).sum(), [x, *rest])]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS, ids=str)
@settings(max_examples=15)
@given(size=SIZES, bias=st.booleans())
def test_against_reference(backend, kind, size, bias):
    values = inputs(*size, bias)
    for got, expected in zip(run(backend, values, **kind), run("reference", values, torch.float64, **kind)):
        assert got.shape == expected.shape
        assert (got - expected).abs().max() <= 2e-6 * (1 + expected.abs().max())


@pytest.mark.parametrize("kernel, act", [(1, None), (2, "gelu"), (4, "silu"), (5, "sigmoid")])
def test_other_kernels_and_activations(kernel, act):
    values = inputs(2, 6, 5, 4, kernel=kernel)
    errors = [
        relative_error(a, b)
        for a, b in zip(run("torch", values, act=act), run("reference", values, torch.float64, act=act))
    ]
    assert max(errors) < 1e-5, errors
    assert ops.chosen_backend(ops.depthwise_conv2d, *values, act=act) == "torch"


@native
def test_threads_and_splits_change_nothing(monkeypatch):
    from ssmzoo.ops.depthwise_conv2d import c as module

    values = inputs(2, 7, 6, 100)
    one = run("c", values, act="silu")
    monkeypatch.setattr(module, "CACHE", 1)  # one tile of channels per task
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert all(torch.equal(a, b) for a, b in zip(run("c", values, act="silu"), one))


@native
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_poisoned_memory_is_written_over(monkeypatch, kind):
    values = inputs(2, 5, 4, 20)
    expected = run("reference", values, torch.float64, **kind)
    make = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: make(*a, **k).fill_(float("nan")))
    assert max(relative_error(a, b) for a, b in zip(run("c", values, **kind), expected)) < 1e-5


@native
def test_nan_stays_where_it_can_reach():
    x, weight, bias = inputs(1, 6, 6, 20)
    x[0, 2, 3, 7] = float("nan")
    with ops.backend("c"):
        y = ops.depthwise_conv2d(x, weight, bias, "silu")
    reached = torch.zeros(1, 6, 6, 20, dtype=torch.bool)
    reached[0, 1:4, 2:5, 7] = True
    assert torch.equal(y.isnan(), reached)


@native
def test_second_derivatives_and_frozen_weights():
    x, weight, bias = (v.requires_grad_() for v in inputs(1, 4, 4, 3))

    def penalty(backend):
        with ops.backend(backend):
            y = ops.depthwise_conv2d(x, weight, bias, "silu")
        (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), [x, weight])

    assert max(relative_error(a, b) for a, b in zip(penalty("c"), penalty("torch"))) < 1e-5
    with ops.backend("c"):
        ops.depthwise_conv2d(x.detach(), weight.detach(), bias).sum().backward()
    assert x.grad is None and weight.grad is None and bias.grad is not None


def test_layer_is_a_convolution_of_torch():
    conv = depthwise_conv(6, stride=2)
    x = torch.randn(2, 7, 5, 6)
    expected = torch.nn.functional.silu(conv(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
    torch.testing.assert_close(fused_depthwise(conv, x, "silu"), expected)
    compiled = torch.compile(lambda x: fused_depthwise(conv, x, "silu"), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert fused_depthwise(conv, x, "silu").dtype == torch.bfloat16


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(2, 3, 4)}, r"x has shape \(2, 3, 4\), expected \(b, h, w, d\)"),
        ({"weight": torch.zeros(4, 1, 3, 3)}, r"weight has shape \(4, 1, 3, 3\), expected \(d=5, 1=1, k, k\)"),
        ({"bias": torch.zeros(4)}, r"bias has shape \(4,\), expected \(d=5\)"),
        ({"act": "tanh"}, "act = 'tanh', expected one of"),
        ({"stride": 3}, "stride = 3, expected 1 or 2"),
        ({"residual": True, "stride": 2}, "residual=True adds x to a map of its size"),
    ],
)
def test_bad_input_is_named(change, message):
    call = {"x": torch.zeros(2, 3, 4, 5), "weight": torch.zeros(5, 1, 3, 3)}
    with pytest.raises(ValueError, match=message):
        ops.depthwise_conv2d(**call | change)
