"""router_logits in PyTorch: one product in float32, whatever autocast says."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmzoo.ops.moe_dispatch import router_logits


@router_logits.register("torch")
def router_logits_torch(a) -> Tensor:
    wide = torch.promote_types(a.x.dtype, torch.float32)
    with torch.autocast(a.x.device.type, enabled=False):
        return a.x.to(wide) @ a.gate.to(wide)
