"""gated_linear_recurrence: values and gradients against float64, on every backend of a CPU."""

import pytest
import torch

from ssmzoo import ops


@pytest.mark.parametrize("backend", ["c", "torch"])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("shape", [(2, 7, 37), (1, 1, 1), (3, 65, 8), (1, 33, 130), (2, 1, 5)])
@pytest.mark.parametrize("carried", [False, True])
def test_values_and_gradients(backend, reverse, shape, carried):
    torch.manual_seed(0)
    b, l, n = shape
    a = torch.rand(b, l, 2 * n)[..., n:]  # strided, as halves of channels are
    a[:, l // 2] = 0  # a boundary
    x, first, dh = torch.randn(b, n, l).transpose(1, 2), torch.randn(b, n), torch.randn(shape)
    results = []
    for dtype, chosen in ((torch.float64, "reference"), (torch.float32, backend)):
        given = [t.to(dtype).requires_grad_() for t in (a, x, first)][: 3 if carried else 2]
        with ops.backend(chosen):
            h = ops.gated_linear_recurrence(
                given[0], given[1], initial_state=given[2] if carried else None, reverse=reverse
            )
        results.append((h, *torch.autograd.grad(h, given, dh.to(dtype))))
    for wanted, got in zip(*results):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)


def test_no_state_crosses_a_decay_of_zero():
    a, x = torch.rand(1, 6, 3), torch.randn(1, 6, 3)
    a[:, 3] = 0
    for backend in ("reference", "torch", "c"):
        with ops.backend(backend):
            whole = ops.gated_linear_recurrence(a, x)
            torch.testing.assert_close(whole[:, 3:], ops.gated_linear_recurrence(a[:, 3:], x[:, 3:]))
            backwards = ops.gated_linear_recurrence(a, x, reverse=True)
            torch.testing.assert_close(backwards[:, :4], ops.gated_linear_recurrence(a[:, :4], x[:, :4], reverse=True))


def test_empty_and_half_precision():
    assert ops.gated_linear_recurrence(torch.zeros(2, 0, 3), torch.zeros(2, 0, 3)).shape == (2, 0, 3)
    a, x = torch.rand(2, 9, 4).bfloat16(), torch.randn(2, 9, 4).bfloat16()
    h = ops.gated_linear_recurrence(a, x)
    assert h.dtype == torch.float32
    torch.testing.assert_close(h, ops.gated_linear_recurrence.reference(a, x))


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match="x has shape"):
        ops.gated_linear_recurrence(torch.zeros(2, 5, 3), torch.zeros(2, 5, 4))
    with pytest.raises(ValueError, match="initial_state has shape"):
        ops.gated_linear_recurrence(torch.zeros(2, 5, 3), torch.zeros(2, 5, 3), initial_state=torch.zeros(2, 4))


def test_tracing_and_second_derivatives():
    a, x = torch.rand(2, 6, 3, requires_grad=True), torch.randn(2, 6, 3, requires_grad=True)
    compiled = torch.compile(lambda a, x: ops.gated_linear_recurrence(a, x) * 2, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(a, x), ops.gated_linear_recurrence(a, x) * 2)
    found = []
    for backend in ("c", "reference"):
        with ops.backend(backend):
            (da,) = torch.autograd.grad(ops.gated_linear_recurrence(a, x).square().sum(), a, create_graph=True)
        found.append(torch.autograd.grad(da.square().sum(), (a, x)))
    torch.testing.assert_close(*found)
