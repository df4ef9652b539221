"""Mamba-3's scan and the complex scan: every backend is the recurrence, with carried state and documents."""

import pytest
import torch

from ssmzoo import ops


def arguments(r=1, l=7, dtype=torch.float64):
    torch.manual_seed(0)
    b, h, p, n = 2, 3, 4, 5
    v, D = torch.randn(b, l, h, p, dtype=dtype), torch.randn(h, dtype=dtype)
    k, q = torch.randn(2, b, l, r, h, n, dtype=dtype)
    a, gamma, beta = -torch.rand(b, l, h, dtype=dtype), *torch.rand(2, b, l, h, dtype=dtype)
    return [v, k, q, a, gamma, beta, D, torch.randn(h, r, p, dtype=dtype) if r > 1 else None]


@pytest.mark.parametrize("r", [1, 3])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("chunk_size", [1, 3, 64])
def test_torch_agrees_with_the_reference(r, documents, chunk_size):
    given = [None if t is None else t.requires_grad_() for t in arguments(r)]
    start = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    seq_idx = torch.tensor([[0, 0, 0, 1, 1, 2, 2], [0] * 7]) if documents else None
    wanted = [t for t in (*given, start) if t is not None]
    results, gradients = [], []
    for backend in ("reference", "torch"):
        with ops.backend(backend):
            y, S = ops.trapezoidal_scan(*given, start, seq_idx, chunk_size)
        results.append((y, S))
        gradients.append(torch.autograd.grad(y.sin().sum() + S.square().sum(), wanted))
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_beta_zero_is_mamba_2():
    v, k, q, a, gamma, beta, D, _ = arguments()
    y, S = ops.trapezoidal_scan(v, k, q, a, gamma, torch.zeros_like(beta), D)
    expected, last = ops.ssd_scan(v * gamma[..., None], a, k[:, :, 0], q[:, :, 0])
    torch.testing.assert_close(y[:, :, 0], expected + v * D[:, None])
    torch.testing.assert_close(S, last)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("start", [False, True])
def test_complex_scan_is_the_recurrence(backend, start):
    a, b = (torch.randn(2, 7, 3, dtype=torch.complex128) for _ in range(2))
    h0 = torch.randn(2, 3, dtype=torch.complex128) if start else None
    h, expected = torch.zeros(2, 3, dtype=torch.complex128) if h0 is None else h0, []
    for t in range(7):
        h = a[:, t] * h + b[:, t]
        expected.append(h)
    with ops.backend(backend):
        torch.testing.assert_close(ops.complex_scan(a, b, h0), torch.stack(expected, 1))
        assert ops.complex_scan(a[:, :0], b[:, :0], h0).shape == (2, 0, 3)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda v, k, *rest: ops.trapezoidal_scan(v, k[:, :, :, :2], *rest), r"k has shape .*expected .*h=3"),
        (lambda v, k, *rest: ops.trapezoidal_scan(v, k.repeat(1, 1, 2, 1, 1), *rest), r"expected \(b=2, l=7, r=1"),
        (lambda v, *rest: ops.trapezoidal_scan(v, *rest, chunk_size=0), "chunk_size = 0"),
        (lambda v, *rest: ops.complex_scan(v[0], v[0]), "a has dtype torch.float64, expected complex64"),
        (lambda v, *rest: ops.router_logits(v, v[0, 0]), r"expected \(... d\) and \(d e\)"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(*arguments())
