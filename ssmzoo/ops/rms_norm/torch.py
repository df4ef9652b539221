"""rms_norm by torch's function, in fp32; and what the kernels share, whose gradients of gradients it has."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmzoo.ops.library import Differentiable, without
from ssmzoo.ops.rms_norm import add, rms_norm


@rms_norm.register("torch")
def rms_norm_torch(a) -> Tensor | tuple[Tensor, Tensor]:
    if a.residual is None:
        return norm(a.x, a.weight, a.eps).to(a.x.dtype)
    stream = add(a.x, a.residual)
    return rms_norm(stream, a.weight, a.eps).to(a.x.dtype), stream


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.rms_norm(x.to(wide), weight.shape, weight.to(wide), eps)


NORM = Differentiable(
    "rms_norm",
    without(rms_norm.Arguments, "residual"),
    saved="scale",  # of every row, 1 / sqrt(mean(x^2) + eps), by the kernels that keep it
    twice=lambda a: norm(a.x, a.weight, a.eps).to(a.x.dtype),
)
