"""State fusion on every backend against the tap-by-tap reference, at awkward sizes."""

import pytest
import torch
from against_reference import BACKENDS, native, rounding

from ssmzoo import ops
from ssmzoo.released.golden import relative_error

SIZES = [
    (2, 6, 13, 8),
    (1, 3, 1, 1),
    (2, 2, 1, 7),
    (1, 2, 40, 3),
    (2, 4, 7, 7),
    (1, 1, 5, 33),
    (1, 2, 70, 56),
    (1, 1, 3, 130),
]


def inputs(b, d, h, w):
    return [torch.randn(b, d, h, w)] + [torch.randn(d, 1, 3, 3) for _ in range(3)] + [torch.randn(3)]


def run(backend, values, dtype=None):
    values = [v.detach().to(dtype or v.dtype).requires_grad_() for v in values]
    x, *kernels, alpha = values
    with ops.backend(backend):
        y = ops.state_fusion(x, kernels, alpha)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    return [y, *torch.autograd.grad((y.double() * weights).sum(), values)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_against_reference(backend, size):
    values = inputs(*size)
    errors = [relative_error(a, b) for a, b in zip(run(backend, values), run("reference", values, torch.float64))]
    assert errors[0] < 1e-6 and max(errors[1:]) < 1e-5, errors


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_known_sum_on_a_constant_map(backend):
    """Kernels and alpha of ones, as at the start of training: 27 taps everywhere, also at the continued border."""
    with ops.backend(backend):
        y = ops.state_fusion(torch.full((1, 2, 6, 9), 3.0), [torch.ones(2, 1, 3, 3)] * 3, torch.ones(3))
    assert torch.equal(y, torch.full((1, 2, 6, 9), 81.0))


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_gradcheck(backend):
    values = [v.double().requires_grad_() for v in inputs(1, 2, 4, 3)]
    with ops.backend(backend):
        assert torch.autograd.gradcheck(lambda x, a, b, c, alpha: ops.state_fusion(x, (a, b, c), alpha), values)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_types_and_repeats(backend):
    x, *kernels, alpha = inputs(2, 5, 9, 6)
    view = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    with ops.backend(backend):
        y = ops.state_fusion(x, kernels, alpha)
        torch.testing.assert_close(ops.state_fusion(view, kernels, alpha), y)
        assert torch.equal(ops.state_fusion(x, kernels, alpha), y)
        half, exact = (ops.state_fusion(t, kernels, alpha) for t in (x.bfloat16(), x.bfloat16().float()))
        assert half.dtype == torch.bfloat16 and relative_error(half, exact) < rounding(torch.bfloat16)
        assert ops.state_fusion(x[:0], kernels, alpha).shape == (0, 5, 9, 6)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(ops.state_fusion(x, kernels, alpha), y)


@native
def test_poisoned_memory_is_written_over(monkeypatch):
    make, make_like = torch.Tensor.new_empty, torch.empty_like
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: make(*a, **k).fill_(float("nan")))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: make_like(*a, **k).fill_(float("nan")))
    values = inputs(2, 3, 10, 5)
    got, expected = run("c", values), run("reference", values, torch.float64)
    assert max(relative_error(a, b) for a, b in zip(got, expected)) < 1e-5


@native
def test_torch_sees_a_proper_operator():
    x, *kernels, alpha = (v.requires_grad_() for v in inputs(1, 2, 6, 5))
    taps = torch.randn(2, 3, 3, 3, requires_grad=True)
    torch.library.opcheck(torch.ops.ssmzoo.state_fusion.default, (x, taps, True, "c"))

    def function(x):
        return ops.state_fusion(x, kernels, alpha)

    with ops.backend("c"):
        expected = function(x)
        torch.testing.assert_close(torch.compile(function, fullgraph=True, backend="aot_eager")(x), expected)
        grad = torch.autograd.grad(expected.sum(), x, create_graph=True)[0]
        with pytest.raises(RuntimeError, match="no double backward"):
            grad.sum().backward()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(2, 3, 4)}, r"x has shape \(2, 3, 4\), expected \(b, d, h, w\)"),
        ({"kernels": [torch.zeros(3, 1, 3, 3)] * 2}, "kernels has 2 entries, expected 3"),
        (
            {"kernels": [torch.zeros(3, 1, 3, 3), torch.zeros(4, 1, 3, 3), torch.zeros(3, 1, 3, 3)]},
            r"the kernel of dilation 3 has shape \(4, 1, 3, 3\), expected \(3, 1, 3, 3\)",
        ),
        ({"alpha": torch.zeros(2)}, r"alpha has shape \(2,\), expected \(3,\)"),
        ({"x": torch.zeros(2, 3, 0, 4)}, "an empty map has no border"),
    ],
)
def test_bad_input_is_named(change, message):
    call = {"x": torch.zeros(2, 3, 4, 5), "kernels": [torch.zeros(3, 1, 3, 3)] * 3, "alpha": torch.ones(3)}
    with pytest.raises(ValueError, match=message):
        ops.state_fusion(**call | change)
