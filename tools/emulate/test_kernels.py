"""A small call of every operator, without gradients and with them, beside the reference in double precision.

Run by run.py, whose plugin afterwards names the kernels of the library that no call has reached.
"""

import pytest
import torch
from toy_operators import EXAMPLES, in_order

from ssmzoo import ops


@pytest.mark.parametrize("example", [name for name in EXAMPLES if name != "token_step"])  # see PROGRAMS in the plugin
def test_values_and_gradients(example):
    torch.manual_seed(0)
    function, tensors, _ = in_order(*EXAMPLES[example]())
    single, tolerance = [t.float() for t in tensors], 1e-4 if example == "quantized_linear" else 1e-5  # rounds inputs
    for run in (values, gradients):
        with ops.backend("reference"):
            expected = run(function, tensors)
        try:
            with ops.backend("c"):
                found = run(function, single)
        except ops.BackendError:  # the kernel is that of a part, or has no gradients
            found = run(function, single)
        for own, right in zip(found, expected, strict=True):
            assert (own - right).norm() <= tolerance * right.norm() + 1e-6


def values(function, tensors):
    with torch.no_grad():
        results = function(*[t.clone() for t in tensors])
    return results if isinstance(results, tuple) else (results,)


def gradients(function, tensors):
    leaves = [t.clone().requires_grad_() for t in tensors]
    results = function(*leaves)
    results = results if isinstance(results, tuple) else (results,)
    loss = sum((r * (1.0 + torch.arange(r.numel()).view(r.shape) % 7)).sum() for r in results)
    return torch.autograd.grad(loss, leaves)
