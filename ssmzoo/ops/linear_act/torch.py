"""linear_act by torch's linear map and activations."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ssmzoo.ops.linear_act import ACTIVATIONS, linear_act


@linear_act.register("torch")
def linear_act_torch(a) -> Tensor:
    return ACTIVATIONS[a.act](F.linear(a.x, a.weight, a.bias))
