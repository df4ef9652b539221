"""Stochastic depth: what is left out of the computation is exactly what would be multiplied by zero."""

import pytest
import torch
from torch import nn

from ssmzoo.layers.image.drop_path import DropPath, FusedDropPathAdd
from ssmzoo.models.spatial_mamba import SpatialMambaBlock
from ssmzoo.models.vmamba import VSSBlock


def step(drop, branch, x, seed, in_full):
    """Result and gradients of x + drop(branch(x)), with the branch computed for all samples or in one step."""
    x = x.clone().requires_grad_()
    torch.manual_seed(seed)
    y = x + DropPath.forward(drop, branch(x)) if in_full else drop(x, branch)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    return y, *torch.autograd.grad((y * weights).sum(), [x, *branch.parameters()])


@pytest.mark.parametrize("p", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("samples", [1, 2, 7])
def test_add_is_the_sum_with_the_branch_dropped(p, samples):
    torch.manual_seed(0)
    branch, x, drop = nn.Linear(5, 5).double(), torch.randn(samples, 3, 5, dtype=torch.float64), FusedDropPathAdd(p)
    for seed in range(8):  # among them draws that keep all samples, some and none
        for found, expected in zip(step(drop, branch, x, seed, False), step(drop, branch, x, seed, True), strict=True):
            torch.testing.assert_close(found, expected)


def test_only_samples_that_count_are_computed():
    seen, x = [], torch.randn(64, 3)
    torch.manual_seed(0)
    FusedDropPathAdd(0.5)(x, lambda x: seen.append(len(x)) or x)
    FusedDropPathAdd(0.5, per_sample=False)(x, lambda x: seen.append(len(x)) or x)
    FusedDropPathAdd(0.5).eval()(x, lambda x: seen.append(len(x)) or x)
    add = FusedDropPathAdd(0.5)
    torch.compile(lambda x: add(x, torch.sin), backend="eager", fullgraph=True)(x)
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
    for per_sample in (True, False):
        block.drop_path.per_sample = per_sample
        block.zero_grad()
        torch.manual_seed(3)
        y = block(x)
        y.square().sum().backward()
        results.append([y, *(p.grad for p in block.parameters())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_batch_norm_sees_the_whole_batch():
    assert not VSSBlock(8, nn.Identity(), norm="bn", drop_path=0.4).drop_path.per_sample


def test_half_precision_branches():
    x, drop = torch.randn(9, 4), FusedDropPathAdd(0.5)
    torch.manual_seed(0)
    y = drop(x, lambda x: x.bfloat16())
    torch.manual_seed(0)
    expected = x + DropPath.forward(drop, x.bfloat16())
    # the branch is rounded to 8 bits of mantissa and doubled: at most 2 * 2^-8 of the largest branch
    assert (y - expected).abs().max() <= 2**-7 * x.abs().max()
    assert y.dtype == torch.float32
