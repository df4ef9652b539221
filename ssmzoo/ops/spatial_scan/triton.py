"""spatial_scan on a GPU: the selective scan's kernels, then one that fuses states and reads them out."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmzoo.ops.checks import why_not_float
from ssmzoo.ops.selective_scan import selective_scan_fn
from ssmzoo.ops.spatial_scan import sequences, spatial_scan
from ssmzoo.ops.state_fusion.triton import fuse
from ssmzoo.ops.triton import DEVICE, MISSING


def why_not(a) -> str | None:
    if a.kernels is None:
        return "fuses states; without kernels the scan does it all"
    if min(a.u.shape) == 0:
        return "has nothing to do for an empty map"
    return why_not_float(a.u, a.steps, a.dt_proj, a.dt_bias, a.A, a.D, *a.kernels, a.alpha)


@spatial_scan.register("triton", device=DEVICE, missing=MISSING, unsupported=why_not)
def spatial_scan_triton(a) -> Tensor:
    delta, x, B, C = sequences(a.u, a.steps, a.dt_proj)
    states = selective_scan_fn(x, delta, a.A, B, torch.ones_like(a.A), delta_bias=a.dt_bias, delta_softplus=True)
    h = states.unflatten(2, a.u.shape[1:3])  # (b e h w)
    y = fuse(h, a.kernels, a.alpha, C.squeeze(-1), a.D, a.u.permute(0, 3, 1, 2))
    return y.permute(0, 2, 3, 1)
