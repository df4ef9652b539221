"""Cases of benchmarks/ops.py: the scan of Mamba-2."""

from __future__ import annotations

import torch
from ops import Case

from ssmzoo import ops

P, N = 64, 128


def inputs(b: int, l: int, h: int) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    call = {
        "x": torch.randn(b, l, h, P, generator=rng),
        "dt": torch.randn(b, l, h, generator=rng),
        "A": -1 - 15 * torch.rand(h, generator=rng),
        "B": torch.randn(b, l, 1, N, generator=rng),
        "C": torch.randn(b, l, 1, N, generator=rng),
        "D": torch.ones(h),
        "dt_bias": torch.full((h,), -3.0),
    }
    return {name: t.requires_grad_() for name, t in call.items()}


def ours(call, backend=None):
    with ops.backend(backend):
        return ops.mamba_chunk_scan_combined(**call, chunk_size=256, dt_softplus=True)


def hugging_face(call):
    """What transformers' Mamba2 runs without mamba_ssm."""
    from ssmzoo._torchvision import make_importable

    make_importable()
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

    rest = {name: value for name, value in call.items() if name != "x"}
    return mamba2_chunk_scan(call["x"], **rest, chunk_size=256, dt_softplus=True)


def training(function, *sizes):
    def build():
        call = inputs(*sizes)
        weight = torch.randn_like(call["x"])
        return lambda: torch.autograd.grad(function(call), list(call.values()), weight)

    return build


def on_torch(call):
    return ours(call, "torch")


CASES = [
    Case(
        f"ssd forward+backward (b, l, h, p, n) = ({b}, {l}, {h}, {P}, {N})",
        {
            "ssmzoo": training(ours, b, l, h),
            "ssmzoo torch": training(on_torch, b, l, h),
            "transformers Mamba2": training(hugging_face, b, l, h),
        },
        target=10,
        repeats=5,
        quick=b == 4,
    )
    for b, l, h in ((1, 2048, 24), (4, 256, 8))
]
