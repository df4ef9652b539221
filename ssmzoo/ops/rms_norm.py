"""Root-mean-square normalisation over the last axis, the norm of the Mamba family."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ssmzoo.ops.checks import compute_dtype, expect_floats
from ssmzoo.ops.dispatch import op


def check_rms_norm(x, weight, eps=1e-5) -> None:
    if weight.ndim != 1 or x.shape[-1:] != weight.shape:
        raise ValueError(f"x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}, expected (... d) and (d)")
    expect_floats(x.device, x=x, weight=weight)


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


@rms_norm.register("torch")
def rms_norm_torch(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)
