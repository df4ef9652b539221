"""Cases of benchmarks/ops.py: state fusion, cross-scan and cross-merge."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from ops import Case

from ssmzoo import ops

MAPS = ((2, 128, 56, 56), (2, 512, 14, 14), (2, 1024, 7, 7))


def inputs(b, d, h, w):
    torch.manual_seed(0)
    return [torch.randn(s, requires_grad=True) for s in ((b, d, h, w), *[(d, 1, 3, 3)] * 3, (3,))]


def fused(x, *rest):
    return ops.state_fusion(x, rest[:3], rest[3])


def convolutions(x, *rest):
    """The three dilated depthwise convolutions with replicate padding, as the released training code runs them."""
    return sum(
        a * F.conv2d(F.pad(x, (d,) * 4, mode="replicate"), k, dilation=d, groups=x.shape[1])
        for a, k, d in zip(rest[3], rest, (1, 3, 5))
    )


def zero_padded(x, *rest):
    """The bare convolutions, padded with zeros: not the same numbers, but what they cost."""
    return sum(F.conv2d(x, k, padding=d, dilation=d, groups=x.shape[1]) for k, d in zip(rest, (1, 3, 5)))


def run(function, size, grad):
    def build():
        values = inputs(*size)
        weight = torch.randn(size)

        def forward():
            with torch.no_grad():
                return function(*values)

        def training():
            return torch.autograd.grad(function(*values), values, weight, allow_unused=True)

        return training if grad else forward

    return build


def there_and_back(x, backend=None):
    with ops.backend(backend):
        return ops.cross_merge(ops.cross_scan(x).unflatten(-1, x.shape[-2:]))


def indexed(x):
    """By gathers with the indices of the four scan directions, as many ports do."""
    return there_and_back(x, "reference")


CASES = [
    Case(
        f"state_fusion {'forward+backward' if grad else 'forward'} {size}",
        {
            "ssmzoo": run(fused, size, grad),
            "three convolutions": run(convolutions, size, grad),
            "three convolutions, zero padding": run(zero_padded, size, grad),
        },
        target=1,
        repeats=9,
    )
    for size in MAPS
    for grad in (False, True)
] + [
    Case(
        f"cross_scan and cross_merge forward+backward {MAPS[0]}",
        {
            "ssmzoo": run(lambda x, *_: there_and_back(x).unflatten(-1, x.shape[-2:]), MAPS[0], True),
            "gathers": run(lambda x, *_: indexed(x).unflatten(-1, x.shape[-2:]), MAPS[0], True),
        },
        repeats=5,
    )
]
