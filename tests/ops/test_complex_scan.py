"""complex_scan: values and gradients against complex128, on every backend of a CPU."""

import pytest
import torch

from ssmzoo import ops


@pytest.mark.parametrize("backend", ["c", "torch"])
@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_values_and_gradients(backend, carried, seed):
    torch.manual_seed(seed)
    shapes = [(2, 7, 37), (1, 1, 1), (3, 65, 8), (1, 33, 130), (2, 1, 5)]
    b, l, n = shapes[seed] if seed < len(shapes) else torch.randint(1, 70, (3,)).tolist()
    a = torch.polar(torch.rand(b, l, 2 * n), 6.3 * torch.rand(b, l, 2 * n))[..., n:]  # strided, as halves are
    a[:, l // 2] = 0  # a boundary
    x, first = torch.randn(b, n, l, dtype=torch.complex64).mT, torch.randn(b, n, dtype=torch.complex64)
    dh = torch.randn(b, l, n, dtype=torch.complex64)
    results = []
    for dtype, chosen in ((torch.complex128, "reference"), (torch.complex64, backend)):
        given = [t.to(dtype).requires_grad_() for t in (a, x, first)[: 3 if carried else 2]]
        with ops.backend(chosen):
            h = ops.complex_scan(*given)
        results.append((h, *torch.autograd.grad(h, given, dh.to(dtype))))
    for wanted, got in zip(*results):
        torch.testing.assert_close(got.to(wanted.dtype), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("start", [False, True])
def test_it_is_the_recurrence(backend, start):
    a, b = (torch.randn(2, 7, 3, dtype=torch.complex128) for _ in range(2))
    h0 = torch.randn(2, 3, dtype=torch.complex128) if start else None
    h, expected = torch.zeros(2, 3, dtype=torch.complex128) if h0 is None else h0, []
    for t in range(7):
        h = a[:, t] * h + b[:, t]
        expected.append(h)
    with ops.backend(backend):
        torch.testing.assert_close(ops.complex_scan(a, b, h0), torch.stack(expected, 1))
        assert ops.complex_scan(a[:, :0], b[:, :0], h0).shape == (2, 0, 3)


def test_carried_states_conjugates_and_numbers_of_threads_change_nothing():
    a, b = torch.randn(2, 3, 40, 21, dtype=torch.complex64)
    a, h0 = 0.5 * a.conj(), b[:, 0]
    assert ops.chosen_backend(ops.complex_scan, a, b, h0) == "c"
    whole, threads = ops.complex_scan(a, b, h0), torch.get_num_threads()
    first = ops.complex_scan(a[:, :13], b[:, :13], h0)
    rest = ops.complex_scan(a[:, 13:], b[:, 13:], first[:, -1])
    try:
        torch.set_num_threads(3 if threads == 1 else 1)
        assert torch.equal(ops.complex_scan(a, b, h0), whole)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.cat([first, rest], 1), whole)


def test_tracing_and_second_derivatives():
    a, b = torch.randn(2, 2, 6, 3, dtype=torch.complex64).requires_grad_().unbind(0)
    compiled = torch.compile(lambda a, b: ops.complex_scan(a, b) * 2, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(a, b), ops.complex_scan(a, b) * 2)
    found = []
    for backend in ("c", "reference"):
        with ops.backend(backend):
            (da,) = torch.autograd.grad(ops.complex_scan(a, b).abs().square().sum(), a, create_graph=True)
        found.append(torch.autograd.grad(da.abs().square().sum(), (a, b)))
    torch.testing.assert_close(*found)
