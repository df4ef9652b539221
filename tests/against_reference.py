"""An operator on one backend beside its float64 reference: what the tests of operators share.

Errors are relative, of a whole tensor. In float32 they stay below OUT, in gradients below GRAD. 16-bit tensors are read
and written by kernels that compute in float32, so that an error is what the roundings at the ends make of it:
`rounding` bounds it.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ssmzoo import ops
from ssmzoo.ops.native import MISSING
from ssmzoo.released.golden import relative_error

native = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
BACKENDS = ["torch", pytest.param("c", marks=native)]
OUT, GRAD = 1e-5, 1e-4  # relative, float32 against float64


def rounding(dtype: torch.dtype, times: int = 1) -> float:
    """The most that rounding every element `times` to the nearest number of `dtype` does to a tensor, and OUT for the
    computation in float32. An element moves by half a unit in the last place, |x| eps / 2, or less; and so does the
    tensor's norm. OUT alone for float32."""
    return OUT + times * torch.finfo(dtype).eps / 2 if dtype.itemsize == 2 else OUT


def random_walk(dtype: torch.dtype, times: int) -> float:
    """What rounding `times` on the way through a model does on average: each moves elements by eps / sqrt(12) in the
    mean square, independently of the others, so that the squares add."""
    return times**0.5 * torch.finfo(dtype).eps / 12**0.5


def packed(b: int, l: int, rng: torch.Generator, share: float = 0.15) -> Tensor:
    """seq_idx (b l) of rows where this share of the tokens begins a document."""
    return (torch.rand(b, l, generator=rng) < share).cumsum(1)


def run(function, backend: str, call: dict, dtype: torch.dtype | None = None) -> tuple[list[Tensor], list[Tensor]]:
    """The results of function(**call), and the gradients of a fixed loss over all of them for every floating-point
    argument, in `dtype` or in the arguments' own."""
    call = {
        k: v.detach().to(dtype or v.dtype).requires_grad_() if torch.is_tensor(v) and v.is_floating_point() else v
        for k, v in call.items()
    }
    leaves = [v for v in call.values() if torch.is_tensor(v) and v.requires_grad]
    with ops.backend(backend):
        results = function(**call)
    results = results if isinstance(results, tuple) else (results,)
    rng = torch.Generator().manual_seed(1)
    loss = sum((r.double() * torch.randn(r.shape, generator=rng)).sum() for r in results)
    return list(results), list(torch.autograd.grad(loss, leaves, materialize_grads=True))


def assert_close(function, call: dict, backend: str, out: float = OUT, grad: float = GRAD):
    """Results and gradients are those of the reference; they are returned."""
    got, expected = run(function, backend, call), run(function, "reference", call, torch.float64)
    for tolerance, xs, ys in zip((out, grad), got, expected):
        errors = [relative_error(x, y) for x, y in zip(xs, ys)]
        assert max(errors) < tolerance, errors
    return got


def assert_rounds_once(function, call: dict, backend: str):
    """Of 16-bit arguments: results are the exact ones, rounded once to their dtype; gradients twice, on their way in
    and out. They are returned."""
    got, expected = run(function, backend, call), run(function, "reference", call, torch.float64)
    (results, grads), (exact, exact_grads) = got, expected
    found = [(relative_error(x, y), rounding(x.dtype)) for x, y in zip(results, exact)]
    found += [(relative_error(x, y), rounding(results[0].dtype, 2)) for x, y in zip(grads, exact_grads)]
    assert all(error < most for error, most in found), found
    return got
