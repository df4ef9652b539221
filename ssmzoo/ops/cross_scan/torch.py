"""cross_scan and cross_merge in PyTorch: views and flips instead of indices."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmzoo.ops.cross_scan import cross_merge, cross_scan


@cross_scan.register("torch")
def cross_scan_torch(a) -> Tensor:
    rows = a.x.flatten(2)
    if a.scans == "unidirectional":
        return torch.stack([rows] * 4, dim=1)
    columns = rows if a.scans == "bidirectional" else a.x.mT.flatten(2)
    if a.scans == "paired":
        return torch.stack([rows, rows.flip(-1), columns, columns.flip(-1)], dim=1)
    return torch.stack([rows, columns, rows.flip(-1), columns.flip(-1)], dim=1)


@cross_merge.register("torch")
def cross_merge_torch(a) -> Tensor:
    h, w = a.y.shape[-2:]
    y = a.y.flatten(3)
    if a.scans == "unidirectional":
        return y.sum(dim=1)
    both = y[:, ::2] + y[:, 1::2].flip(-1) if a.scans == "paired" else y[:, :2] + y[:, 2:].flip(-1)
    rows, columns = both.unbind(1)
    return rows + (columns if a.scans == "bidirectional" else columns.unflatten(-1, (w, h)).mT.flatten(2))
