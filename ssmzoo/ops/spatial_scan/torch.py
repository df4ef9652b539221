"""spatial_scan by its parts, each on the fastest backend there is."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmzoo.ops.selective_scan import selective_scan_fn
from ssmzoo.ops.spatial_scan import sequences, spatial_scan
from ssmzoo.ops.state_fusion import state_fusion


@spatial_scan.register("torch")
def spatial_scan_torch(a) -> Tensor:
    delta, x, B, C = sequences(a.u, a.steps, a.dt_proj)
    states = selective_scan_fn(x, delta, a.A, B, torch.ones_like(a.A), delta_bias=a.dt_bias, delta_softplus=True)
    h = states.unflatten(2, a.u.shape[1:3])
    h = h if a.kernels is None else state_fusion(h, a.kernels, a.alpha)
    return h.permute(0, 2, 3, 1) * C + a.D * a.u
