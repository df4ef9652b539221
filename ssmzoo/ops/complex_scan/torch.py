"""complex_scan in PyTorch: log2(l) vectorised rounds."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmzoo.ops.complex_scan import complex_scan


@complex_scan.register("torch")
def complex_scan_torch(given) -> Tensor:
    """Only products of a are formed, so that nothing overflows for |a| <= 1."""
    a, b, initial_state = given
    step, l = 1, a.shape[1]
    while step < l:
        b = torch.cat([b[:, :step], b[:, step:] + a[:, step:] * b[:, :-step]], dim=1)
        a = torch.cat([a[:, :step], a[:, step:] * a[:, :-step]], dim=1)
        step *= 2
    return b if initial_state is None else b + a * initial_state[:, None]
