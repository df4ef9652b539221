"""Gradients that are sums over channels do not depend on how many threads share the work."""

import pytest
import torch
from against_reference import native, run
from test_cross_selective_scan import arguments, value_and_gradients
from test_selective_scan import inputs

from ssmzoo import ops


def scan():
    results, grads = run(ops.selective_scan_fn, "c", inputs(b=1, e=150, l=70, n=6))
    return [*results, *grads]


def four_scans():
    return value_and_gradients("c", arguments(1, 72, 9, 14, 3, 4, dtype=torch.float32), "cross")


@native
@pytest.mark.parametrize("compute", [scan, four_scans])
def test_as_many_threads_as_you_like(compute):
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(compute())
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        assert all(ours.equal(first) for ours, first in zip(others, found[0], strict=True))
