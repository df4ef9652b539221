"""Rows of a table that tokens name: products and sums on every backend against the float64 reference."""

import against_reference as checks
import pytest
import torch
from against_reference import BACKENDS, native

from ssmzoo import ops
from ssmzoo.released.golden import relative_error


def inputs(tokens=(2, 7), k=3, e=11, d=20, seed=0):
    rng = torch.Generator().manual_seed(seed)
    entry = torch.randint(e, (*tokens, k), generator=rng)
    table, x = torch.randn(e, d, generator=rng), torch.randn(*tokens, d, generator=rng)
    return table, entry, x, torch.randn(*tokens, k, generator=rng)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "sizes", [{}, {"tokens": (150,), "k": 1}, {"d": 1}, {"d": 16, "e": 1}, {"d": 300, "k": 16}, {"tokens": (3, 1, 70)}]
)
def test_against_the_reference(backend, sizes):
    table, entry, x, weight = inputs(**sizes)
    checks.assert_close(ops.dot_rows, {"table": table, "entry": entry, "x": x}, backend)
    checks.assert_close(ops.sum_rows, {"table": table, "entry": entry, "weight": weight}, backend)


@native
def test_strides_poison_and_threads(monkeypatch):
    table, entry, x, weight = inputs(tokens=(70,), d=40)
    make = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: make(*a, **k).fill_(float("nan")))
    slanted = table.t().contiguous().t(), entry.t().contiguous().t(), x.t().contiguous().t()
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found.append(checks.assert_close(ops.dot_rows, dict(zip(("table", "entry", "x"), slanted)), "c"))
        found.append(checks.assert_close(ops.sum_rows, {"table": table, "entry": entry, "weight": weight}, "c"))
    torch.set_num_threads(1)
    for one, three in zip(found[:2], found[2:]):
        assert all(torch.equal(a, b) for xs, ys in zip(one, three) for a, b in zip(xs, ys))


@native
def test_gradients_of_gradients_are_the_torch_forms():
    table, entry, x, _ = inputs()
    table, x = table.requires_grad_(), x.requires_grad_()

    def twice(backend):
        with ops.backend(backend):
            grads = torch.autograd.grad(ops.dot_rows(table, entry, x).square().sum(), (table, x), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), (table, x))

    assert all(relative_error(a, b) < checks.OUT for a, b in zip(twice("c"), twice("torch")))


def test_bad_input_is_named():
    table, entry, x, weight = inputs()
    with pytest.raises(ValueError, match=r"x has shape \(2, 7, 19\), expected \(2, 7, 20\)"):
        ops.dot_rows(table, entry, x[..., :19])
    with pytest.raises(ValueError, match=r"weight has shape \(2, 7, 2\), expected \(2, 7, 3\)"):
        ops.sum_rows(table, entry, weight[..., :2])
    with pytest.raises(ValueError, match="entry has dtype torch.int32, expected int64"):
        ops.sum_rows(table, entry.int(), weight)
    with pytest.raises(IndexError):
        ops.sum_rows(table, entry + 6, weight)
