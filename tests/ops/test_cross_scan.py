"""Cross-scan and cross-merge: known scan directions on a small map, and each the transpose of the other."""

import pytest
import torch

from ssmzoo import ops

BACKENDS = ["reference", "torch"]
SCANS = ["cross", "unidirectional", "bidirectional", "paired"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_known_orders(backend):
    x = torch.tensor([[1, 2, 3], [4, 5, 6]]).float().view(1, 1, 2, 3)
    rows, columns = [1, 2, 3, 4, 5, 6], [1, 4, 2, 5, 3, 6]
    with ops.backend(backend):
        assert ops.cross_scan(x)[0, :, 0].tolist() == [rows, columns, rows[::-1], columns[::-1]]
        assert ops.cross_scan(x, "unidirectional")[0, :, 0].tolist() == [rows] * 4
        assert ops.cross_scan(x, "bidirectional")[0, :, 0].tolist() == [rows, rows, rows[::-1], rows[::-1]]
        assert ops.cross_scan(x, "paired")[0, :, 0].tolist() == [rows, rows[::-1], columns, columns[::-1]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scans", SCANS)
@pytest.mark.parametrize("h, w", [(1, 1), (1, 5), (4, 7), (8, 3)])
def test_merge_undoes_and_adds(backend, scans, h, w):
    x = torch.randn(2, 3, h, w)
    with ops.backend(backend):
        merged = ops.cross_merge(ops.cross_scan(x, scans).view(2, 4, 3, h, w), scans)
    torch.testing.assert_close(merged, 4 * x.flatten(2))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scans", SCANS)
def test_each_is_the_transpose_of_the_other(backend, scans):
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    y = torch.randn(2, 4, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    with ops.backend(backend):
        scanned, merged = ops.cross_scan(x, scans), ops.cross_merge(y, scans)
        torch.testing.assert_close((scanned * y.flatten(3)).sum(), (x.flatten(2) * merged).sum())
        assert torch.autograd.gradcheck(lambda x: ops.cross_scan(x, scans), x)
        assert torch.autograd.gradcheck(lambda y: ops.cross_merge(y, scans), y)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_types_and_compilation(backend):
    x = torch.randn(2, 4, 5, 3, dtype=torch.bfloat16).permute(0, 3, 1, 2)  # a channels-last map
    with ops.backend(backend):
        scanned = ops.cross_scan(x)
        assert scanned.dtype == torch.bfloat16 and torch.equal(scanned, ops.cross_scan(x.contiguous()))
        assert torch.equal(torch.compile(ops.cross_scan, fullgraph=True, backend="aot_eager")(x), scanned)
        assert ops.cross_scan(x[:0]).shape == (0, 4, 3, 20)


@pytest.mark.parametrize(
    "function, argument, scans, message",
    [
        (ops.cross_scan, (2, 3, 20), "cross", r"x has shape \(2, 3, 20\), expected \(b, c, h, w\)"),
        (ops.cross_merge, (2, 3, 4, 5), "cross", r"y has shape \(2, 3, 4, 5\), expected \(b, k=4, c, h, w\)"),
        (ops.cross_merge, (2, 2, 3, 4, 5), "cross", r"y has shape \(2, 2, 3, 4, 5\), expected \(b=2, k=4, c, h, w\)"),
        (
            ops.cross_scan,
            (2, 3, 4, 5),
            "spiral",
            "scans = 'spiral', expected one of cross, unidirectional, bidirectional, paired",
        ),
    ],
)
def test_bad_input_is_named(function, argument, scans, message):
    with pytest.raises(ValueError, match=message):
        function(torch.zeros(argument), scans)
