"""state_fusion in PyTorch: three dilated depthwise convolutions on one replicate-padded map."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmzoo.ops.checks import compute_dtype
from ssmzoo.ops.state_fusion import DILATIONS, state_fusion, taps


@state_fusion.register("torch")
def state_fusion_torch(a) -> Tensor:
    dtype = compute_dtype(a.x)
    weight = taps(a.kernels, a.alpha, dtype)
    padded = F.pad(a.x.to(dtype), (5, 5, 5, 5), mode="replicate")
    h, w = padded.shape[-2:]
    y = 0
    with torch.autocast(a.x.device.type, enabled=False):
        for k, dilation in enumerate(DILATIONS):
            cut = 5 - dilation
            view = padded[..., cut : h - cut, cut : w - cut]
            y = y + F.conv2d(view, weight[:, k : k + 1], dilation=dilation, groups=a.x.shape[1])
    return y.to(a.x.dtype)
