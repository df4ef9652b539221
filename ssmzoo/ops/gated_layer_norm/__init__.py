"""Layer normalisation over the last axis times a SiLU gate: the norm and gate behind the mixers of the image models."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmzoo.ops.checks import compute_dtype, expect_floats
from ssmzoo.ops.dispatch import op


def check_gated_layer_norm(a) -> None:
    shape = a.weight.shape
    if a.weight.ndim != 1 or shape != a.bias.shape or a.x.shape[-1:] != shape or a.z.shape != a.x.shape:
        raise ValueError(
            f"x has shape {tuple(a.x.shape)}, z {tuple(a.z.shape)}, weight {tuple(shape)} and bias "
            f"{tuple(a.bias.shape)}, expected (... d), (... d), (d) and (d)"
        )
    expect_floats(a, {}, x="...", z="...", weight="d", bias="d")


@op(check=check_gated_layer_norm)
def gated_layer_norm(x: Tensor, z: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """y = ((x - mean) / sqrt(variance + eps) * weight + bias) * SiLU(z), mean and variance of the last axis.

    x, z (... d), weight and bias (d); returns (... d) in x's dtype, computed in fp32 (fp64 for fp64 input).
    Raises ValueError when the shapes do not fit.
    """
    dtype = compute_dtype(x)
    x32, z32 = x.to(dtype), z.to(dtype)
    centred = x32 - x32.mean(-1, keepdim=True)
    normal = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return ((normal * weight.to(dtype) + bias.to(dtype)) * z32 * torch.sigmoid(z32)).to(x.dtype)
