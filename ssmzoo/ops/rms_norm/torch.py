"""rms_norm by torch's function of this name."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ssmzoo.ops.rms_norm import rms_norm


@rms_norm.register("torch")
def rms_norm_torch(a) -> Tensor:
    return F.rms_norm(a.x, a.weight.shape, a.weight, a.eps)
