"""cross_selective_scan by its parts, each on the fastest backend there is (the scan on a GPU's, for instance)."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmzoo.ops.cross_scan import cross_merge, cross_scan
from ssmzoo.ops.cross_selective_scan import cross_selective_scan, project
from ssmzoo.ops.selective_scan import selective_scan_fn


@cross_selective_scan.register("torch")
def cross_selective_scan_torch(a) -> Tensor:
    size = a.x.shape[2:]
    xs = cross_scan(a.x, a.scans)  # (b k e l)
    dt, B, C = project(xs, a.x_proj, a.A.shape[1])
    delta = torch.matmul(a.dt_proj, dt).flatten(1, 2)  # (b ke l)
    y = selective_scan_fn(xs.flatten(1, 2), delta, a.A, B, C, a.D, delta_bias=a.dt_bias.flatten(), delta_softplus=True)
    y = cross_merge(y.unflatten(1, (4, -1)).unflatten(-1, size), a.scans)  # (b e l)
    return y.transpose(1, 2).unflatten(1, size)
