"""Stochastic depth: what is left out of the computation is exactly what would be multiplied by zero."""

import pytest
import torch
from torch import nn

from ssmzoo.layers.image.drop_path import DropPath
from ssmzoo.models.spatial_mamba import SpatialMambaBlock
from ssmzoo.models.vmamba import VSSBlock


def step(drop, branch, x, seed, in_full):
    """Result and gradients of x + drop(branch(x)), with the branch computed for all samples or by `add`."""
    x = x.clone().requires_grad_()
    torch.manual_seed(seed)
    y = x + drop(branch(x)) if in_full else drop.add(x, branch)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    return y, *torch.autograd.grad((y * weights).sum(), [x, *branch.parameters()])


@pytest.mark.parametrize("p", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("samples", [1, 2, 7])
def test_add_is_the_sum_with_the_branch_dropped(p, samples):
    torch.manual_seed(0)
    branch, x, drop = nn.Linear(5, 5).double(), torch.randn(samples, 3, 5, dtype=torch.float64), DropPath(p)
    for seed in range(8):  # among them draws that keep all samples, some and none
        for found, expected in zip(step(drop, branch, x, seed, False), step(drop, branch, x, seed, True), strict=True):
            torch.testing.assert_close(found, expected)


def test_only_samples_that_count_are_computed():
    seen, x = [], torch.randn(64, 3)
    torch.manual_seed(0)
    DropPath(0.5).add(x, lambda x: seen.append(len(x)) or x)
    DropPath(0.5, apart=False).add(x, lambda x: seen.append(len(x)) or x)
    DropPath(0.5).eval().add(x, lambda x: seen.append(len(x)) or x)
    torch.compile(lambda x: DropPath(0.5).add(x, torch.sin), backend="eager", fullgraph=True)(x)
    assert 16 < seen[0] < 48 and seen[1:] == [64, 64]


@pytest.mark.parametrize(
    "build",
    [
        lambda: SpatialMambaBlock(8, drop_path=0.4),
        lambda: VSSBlock(8, SpatialMambaBlock(8).self_attention, drop_path=0.4),
    ],
)
def test_blocks_learn_the_same(build):
    torch.manual_seed(0)
    block, x, results = build().train(), torch.randn(6, 4, 5, 8), []
    for apart in (True, False):
        block.drop_path.apart = apart
        block.zero_grad()
        torch.manual_seed(3)
        y = block(x)
        y.square().sum().backward()
        results.append([y, *(p.grad for p in block.parameters())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_batch_norm_sees_the_whole_batch():
    assert not VSSBlock(8, nn.Identity(), norm="bn", drop_path=0.4).drop_path.apart


def test_half_precision_branches():
    x, drop = torch.randn(9, 4), DropPath(0.5)
    torch.manual_seed(0)
    y = drop.add(x, lambda x: x.bfloat16())
    torch.manual_seed(0)
    torch.testing.assert_close(y, x + drop(x.bfloat16()), rtol=1e-2, atol=1e-2)
    assert y.dtype == torch.float32
