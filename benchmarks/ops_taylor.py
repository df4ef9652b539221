"""Cases of benchmarks/ops.py: Based's linear attention against all pairs of positions, as its quadratic form trains."""

from __future__ import annotations

import torch
from ops import Case

from ssmzoo import ops
from ssmzoo.ops.taylor_attention import quadratic

F, P = 16, 64


def inputs(b: int, l: int, h: int) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(b, l, h, width, generator=rng).requires_grad_() for width in (F, F, P)]


def training(function, *sizes):
    def build():
        call = inputs(*sizes)
        weight = torch.randn_like(call[2])
        return lambda: torch.autograd.grad(function(*call), call, weight)

    return build


def ours(q, k, v, backend=None):
    with ops.backend(backend):
        return ops.taylor_attention(q, k, v)[0]


def on_torch(q, k, v):
    return ours(q, k, v, "torch")


CASES = [
    Case(
        f"taylor_attention forward+backward (b, l, h, f, p) = ({b}, {l}, {h}, {F}, {P})",
        {
            "ssmzoo": training(ours, b, l, h),
            "ssmzoo torch": training(on_torch, b, l, h),
            "all pairs in PyTorch": training(quadratic, b, l, h),
        },
        target=5,
        repeats=3,
    )
    for b, l, h in ((4, 2048, 16),)
]
