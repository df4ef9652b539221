"""A model that the probes have never seen: what it scans with operators is understood without a line about it."""

import ast
from pathlib import Path

import pytest
import torch
from torch import nn

from ssmzoo import ops
from ssmzoo.probes.attention_matrices import attention, exactness
from ssmzoo.probes.tap import tap

PROBES = Path(ops.__file__).parents[1] / "probes"


class Scanner(nn.Module):
    """A selective scan of (b e l) with constant parameters."""

    def __init__(self, e: int):
        super().__init__()
        self.A, self.D = nn.Parameter(-torch.rand(e, 3)), nn.Parameter(torch.rand(e))

    def forward(self, x):
        steps = torch.full_like(x, 0.3)
        return ops.selective_scan_fn(x, steps, self.A, x[:, :3].contiguous(), x[:, 1:4].contiguous(), self.D)


class Novel(nn.Module):
    """Tokens (b l d) in a random order, then both directions of it, in a module of their own."""

    def __init__(self, order, d: int = 4):
        super().__init__()
        self.order, self.inner = order, Both(d)

    def forward(self, x):
        y = self.inner(ops.permute_tokens(x, self.order))
        return ops.permute_tokens(y, self.order, inverse=True)


class Both(nn.Module):
    def __init__(self, d: int):
        super().__init__()
        self.scan = Scanner(2 * d)

    def forward(self, x):
        y = self.scan(ops.bidirectional_scan(x.mT).flatten(1, 2)).unflatten(1, (2, -1))
        return (y[:, 0] + y[:, 1].flip(-1)).mT


@torch.no_grad()
@pytest.mark.parametrize("batched", [False, True])
def test_orders_of_callers_and_directions_are_composed(batched):
    torch.manual_seed(0)
    order = torch.stack([torch.randperm(6) for _ in range(2)]) if batched else torch.randperm(6)
    model, x = Novel(order), torch.randn(2, 6, 4)
    with tap(model) as scans:
        y = model(x)
    (scan,) = scans
    assert scan.name == "inner.scan" and scan.directions == 2 and exactness(scan) < 1e-5
    assert torch.equal(scan.tokens(0), order) and torch.equal(scan.tokens(7), order.flip(-1))
    alpha = attention(scan)  # by the tokens of the model: times its input, plus the skip, it is the model's output
    both = torch.cat([x.mT, x.mT], dim=1)  # (b 2d l)
    out = (alpha @ both[..., None])[..., 0] + scan.D[:, None] * both
    torch.testing.assert_close((out[:, :4] + out[:, 4:]).mT, y)


@torch.no_grad()
def test_the_mean_in_front_of_flipped_tokens_is_a_token_more():
    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.scan = Scanner(4)

        def forward(self, x):
            back = torch.arange(x.shape[1] - 1, -1, -1)
            x = ops.prepend_mean(ops.permute_tokens(x, back))
            y = self.scan(x.mT).mT[:, 1:]
            return ops.permute_tokens(y, back, inverse=True)

    with tap(model := Mean()) as scans:
        model(torch.randn(2, 5, 4))
    assert scans[0].extra == 1 and scans[0].tokens(0).tolist() == [5, 4, 3, 2, 1, 0]


@torch.no_grad()
def test_a_map_scanned_by_rows_of_the_batch():
    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.scan = Scanner(4)

        def forward(self, x):
            return self.scan(ops.cross_scan(x, "paired").flatten(0, 1))

    with tap(model := Rows()) as scans:
        model(torch.randn(2, 4, 2, 3))
    rows, columns = [0, 1, 2, 3, 4, 5], [0, 3, 1, 4, 2, 5]
    expected = [rows, rows[::-1], columns, columns[::-1]] * 2
    assert scans[0].tokens(1).tolist() == expected


def test_probes_know_no_model():
    """Classes of models and mixers are for experiments that build them, by functions that say so."""
    for file in PROBES.glob("*.py"):
        for node in ast.parse(file.read_text()).body:  # what a probe needs to look
            if isinstance(node, ast.ImportFrom) and node.module:
                assert not node.module.startswith(("ssmzoo.models", "ssmzoo.layers.mixers", "ssmzoo.layers.image")), (
                    f"{file.name} imports {node.module}"
                )
