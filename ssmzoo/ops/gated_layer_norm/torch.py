"""gated_layer_norm by torch's layer norm; and what the kernels share, whose gradients of gradients it has."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ssmzoo.ops.gated_layer_norm import gated_layer_norm
from ssmzoo.ops.library import Differentiable


@gated_layer_norm.register("torch")
def gated_layer_norm_torch(a) -> Tensor:
    return F.layer_norm(a.x, a.weight.shape, a.weight, a.bias, a.eps) * F.silu(a.z)


NORM = Differentiable("gated_layer_norm", gated_layer_norm.Arguments, saved="moments", twice=gated_layer_norm_torch)
