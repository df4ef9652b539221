"""depthwise_conv2d on torch's own convolution."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ssmzoo.ops.depthwise_conv2d import ACTIVATIONS, depthwise_conv2d


@depthwise_conv2d.register("torch")
def depthwise_conv2d_torch(a) -> Tensor:
    source, padding = F.relu(a.x) if a.rectify else a.x, (a.weight.shape[-1] - 1) // 2
    y = F.conv2d(source.permute(0, 3, 1, 2), a.weight, a.bias, a.stride, padding, groups=a.x.shape[-1])
    y = ACTIVATIONS[a.act](y).permute(0, 2, 3, 1)
    return a.x + y if a.residual else y
