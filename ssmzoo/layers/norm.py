"""Normalisations over the last axis, with statistics in fp32 whatever the precision of the input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssmzoo.ops import rms_norm
from ssmzoo.ops.token_step import Register


def fp32(x: Tensor) -> Tensor:
    """Half precision -> float32; float32 and float64 as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight, in the dtype of the weight. (... dim) -> (... dim)"""

    def __init__(self, dim: int, eps: float = 1e-5):
        super().__init__()
        self.dim, self.eps = dim, eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if x.dtype == weight.dtype == torch.float32:
            return rms_norm(x, weight, self.eps)
        wide = torch.promote_types(x.dtype, torch.float32)
        return rms_norm(x.to(wide), weight.to(wide), self.eps).to(weight.dtype)

    def program(self, p: Any, x: Register) -> Register:
        return p.normalise(x, self.weight, None, self.eps)

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}"


class LayerNorm(nn.LayerNorm):
    """torch's LayerNorm that takes an fp32 residual stream into a model of lower precision."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(fp32(x), self.normalized_shape, fp32(self.weight), fp32(self.bias), self.eps).to(
            self.weight.dtype
        )

    def program(self, p: Any, x: Register) -> Register:
        return p.normalise(x, self.weight, self.bias, self.eps, layer=True)


class GatedRMSNorm(nn.Module):
    """RMSNorm with a gate. y, z (... dim) -> (... dim)

        RMS(y act(z)) weight          norm_before_gate=False
        RMS(y) weight act(z)          norm_before_gate=True

    The mean square is taken over groups of `group_size` neighbouring channels (all of them by default).
    activation   act: silu or sigmoid
    """

    def __init__(
        self,
        dim: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = False,
        activation: str = "silu",
    ):
        super().__init__()
        self.eps, self.group_size, self.norm_before_gate = eps, group_size or dim, norm_before_gate
        self.activation = {"silu": F.silu, "sigmoid": torch.sigmoid}[activation]
        if dim % self.group_size:
            raise ValueError(f"group_size must divide the {dim} channels, got {group_size}")
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        y, gate, weight = fp32(y), self.activation(fp32(z)), fp32(self.weight)
        if not self.norm_before_gate:
            y = y * gate
        if self.group_size == len(weight):
            y = rms_norm(y, weight, self.eps)
        else:
            size = (self.group_size,)
            y = F.rms_norm(y.unflatten(-1, (-1, *size)), size, None, self.eps).flatten(-2) * weight
        return (y * gate if self.norm_before_gate else y).to(self.weight.dtype)
