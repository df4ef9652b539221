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
    if a.residual is not None and a.residual.shape != a.x.shape:
        raise ValueError(f"residual has shape {tuple(a.residual.shape)}, expected that of x, {tuple(a.x.shape)}")
    expect_floats(a, {}, x="...", weight="d", residual="...")


@op(check=check_rms_norm)
def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-5, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """y = x / sqrt(mean(x^2) + eps) * weight; with a residual stream r: s = r + x, and y of s.

    x (... d), weight (d), residual (... d)
    returns  y (... d) in x's dtype, the mean taken in fp32 (fp64 for fp64 input); with a residual y and s, in the
             residual's dtype, which is what y is computed from
    Raises ValueError when the shapes do not fit.
    Source: Zhang & Sennrich 2019 (arXiv 1910.07467), section 4.
    """
    stream = x if residual is None else add(x, residual)
    dtype = compute_dtype(stream)
    x32 = stream.to(dtype)
    y = (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps) * weight.to(dtype)).to(x.dtype)
    return y if residual is None else (y, stream)


def add(x: Tensor, residual: Tensor) -> Tensor:
    """residual + x, rounded once to the residual's dtype."""
    return (residual.to(compute_dtype(x, residual)) + x).to(residual.dtype)
