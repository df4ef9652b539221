"""rms_norm: values and gradients against float64, on every backend of a CPU."""

import pytest
import torch

from ssmzoo import ops


@pytest.mark.parametrize("backend", ["c", "torch"])
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
    with torch.no_grad(), ops.backend("c"):
        got = ops.rms_norm(x, weight)
    with ops.backend("reference"):
        torch.testing.assert_close(got, ops.rms_norm(x, weight))


def test_tracing_and_second_derivatives():
    x, weight = torch.randn(3, 8, requires_grad=True), torch.rand(8, requires_grad=True)
    compiled = torch.compile(lambda x, w: ops.rms_norm(x, w) * 2, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weight), ops.rms_norm(x, weight) * 2)
    grads = []
    for backend in ("c", "torch"):
        with ops.backend(backend):
            (grad,) = torch.autograd.grad(ops.rms_norm(x, weight).square().sum(), x, create_graph=True)
        grads.append(torch.autograd.grad(grad.square().sum(), (x, weight)))
    torch.testing.assert_close(*grads)
