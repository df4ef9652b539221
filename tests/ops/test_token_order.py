"""Operators of token order: every backend against plain indexing, and a scan layout that knows its own inverse."""

import pytest
import torch

from ssmzoo import ops

BACKENDS = ["reference", "torch"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batched", [False, True])
def test_tokens_are_permuted_and_brought_back(backend, batched):
    x = torch.randn(3, 5, 2, dtype=torch.float64, requires_grad=True)
    order = torch.stack([torch.randperm(5) for _ in range(3)]) if batched else torch.randperm(5)
    with ops.backend(backend):
        y = ops.permute_tokens(x, order)
        for row in range(3):
            assert torch.equal(y[row], x[row, order[row] if batched else order])
        assert torch.equal(ops.permute_tokens(y, order, inverse=True), x)
        assert torch.autograd.gradcheck(lambda x: ops.permute_tokens(x, order), x)
        assert ops.permute_tokens(x[:0], order[:0] if batched else order).shape == (0, 5, 2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_both_directions_the_mean_and_mixtures(backend):
    x, P = torch.randn(2, 3, 5), torch.rand(2, 4, 5)
    with ops.backend(backend):
        assert torch.equal(ops.bidirectional_scan(x), torch.stack([x, x.flip(2)], dim=1))
        front = ops.prepend_mean(x)
        torch.testing.assert_close(front[:, 0], x.mean(1))
        assert torch.equal(front[:, 1:], x)
        torch.testing.assert_close(ops.mix_tokens(x, P), torch.einsum("bml,bel->bem", P, x))


def test_they_trace():
    x, order = torch.randn(2, 4, 4), torch.tensor([2, 0, 3, 1])

    def through(x):
        y = ops.permute_tokens(ops.prepend_mean(x)[:, 1:], order, inverse=True)
        return ops.mix_tokens(ops.bidirectional_scan(y)[:, 0], y)

    assert torch.equal(torch.compile(through, fullgraph=True, backend="aot_eager")(x), through(x))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x: ops.permute_tokens(x, torch.arange(3)), r"order has shape \(3,\), expected \(l=4\)"),
        (lambda x: ops.permute_tokens(x, torch.rand(4)), "order is torch.float32 .*expected int64 or int32"),
        (lambda x: ops.bidirectional_scan(x[0]), r"x has shape \(4, 4\), expected \(b, e, l\)"),
        (lambda x: ops.prepend_mean(x.long()), "x has dtype torch.int64"),
        (lambda x: ops.mix_tokens(x, x[:, :, :3]), r"weights has shape .*expected .*l=4"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(2, 4, 4))
