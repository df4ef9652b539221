"""rms_norm: values and gradients against float64, on every backend of a CPU."""

import pytest
import torch

from ssmzoo import ops


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("shape", [(3, 37), (2, 65, 256), (1, 1, 1), (0, 5), (130, 7)])
def test_values_and_gradients(backend, shape):
    torch.manual_seed(0)
    x, weight, dy = torch.randn(shape), torch.rand(shape[-1]), torch.randn(shape)
    results = []
    for dtype, chosen in ((torch.float64, "reference"), (torch.float32, backend)):
        x_, w_ = x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
        with ops.backend(chosen):
            y = ops.rms_norm(x_, w_, 1e-5)
        results.append((y, *torch.autograd.grad(y, (x_, w_), dy.to(dtype))))
    for wanted, got in zip(*results):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)


def test_without_gradients_and_with_strides():
    x, weight = torch.randn(4, 6, 16).transpose(0, 1), torch.rand(16)
    with torch.no_grad(), ops.backend("native"):
        got = ops.rms_norm(x, weight)
    with ops.backend("reference"):
        torch.testing.assert_close(got, ops.rms_norm(x, weight))


def test_operator_checks_and_second_derivatives():
    x, weight = torch.randn(3, 8, requires_grad=True), torch.rand(8, requires_grad=True)
    torch.library.opcheck(torch.ops.ssmzoo.rms_norm.default, (x, weight, 1e-5))
    compiled = torch.compile(lambda x, w: ops.rms_norm(x, w) * 2, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weight), ops.rms_norm(x, weight) * 2)
    (grad,) = torch.autograd.grad(ops.rms_norm(x, weight).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="backend\\('torch'\\)"):
        grad.sum().backward()


def test_half_precision_and_wrong_widths_go_elsewhere():
    assert ops.chosen_backend(ops.rms_norm, torch.ones(2, 4, dtype=torch.bfloat16), torch.ones(4)) == "torch"
    with pytest.raises(ValueError, match="shape"):
        ops.rms_norm(torch.ones(2, 5), torch.ones(4))
