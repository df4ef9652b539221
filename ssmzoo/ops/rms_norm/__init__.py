"""Root-mean-square normalisation over the last axis, the norm of the Mamba family."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmzoo.ops.checks import compute_dtype, expect_floats
from ssmzoo.ops.dispatch import op


def check_rms_norm(a) -> None:
    if a.weight.ndim != 1 or a.x.shape[-1:] != a.weight.shape:
        shapes = f"x has shape {tuple(a.x.shape)} and weight {tuple(a.weight.shape)}"
        raise ValueError(f"{shapes}, expected (... d) and (d)")
    expect_floats(a, {}, x="...", weight="d")


@op(check=check_rms_norm)
def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) * weight.

    x (... d), weight (d); returns (... d) in x's dtype, the mean taken in fp32 (fp64 for fp64 input).
    Raises ValueError when the shapes do not fit.
    Source: Zhang & Sennrich 2019 (arXiv 1910.07467), section 4.
    """
    dtype = compute_dtype(x)
    x32 = x.to(dtype)
    return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps) * weight.to(dtype)).to(x.dtype)
