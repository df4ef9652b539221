"""Cross-scan and cross-merge: a 2-D map as four 1-D sequences and back (VMamba's SS2D).

    scans             k0            k1               k2               k3
    "cross"           rows          columns          rows reversed    columns reversed
    "unidirectional"  rows          rows             rows             rows
    "bidirectional"   rows          rows             rows reversed    rows reversed
    "paired"          rows          rows reversed    columns          columns reversed

`cross_merge` undoes the four scan directions and adds the results, without a factor 1/4; the two functions are each
other's transpose, so that the gradient of one is the other.

Letters: b batch, c channels, h rows, w columns, l = h w.
Source: Liu et al. 2024 (arXiv 2401.10166), section 4.2; MzeroMiko/VMamba classification/models/csm_triton.py.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from ssmzoo.ops.checks import expect_floats
from ssmzoo.ops.dispatch import op

SCANS = ("cross", "unidirectional", "bidirectional")  # what `cross_selective_scan` takes
LAYOUTS = (*SCANS, "paired")


def check_cross_scan(a) -> None:
    expect_floats(a, {}, x="bchw")
    expect_layout(a.scans)


def check_cross_merge(a) -> None:
    expect_floats(a, {"k": 4}, y="bkchw")
    expect_layout(a.scans)


def expect_layout(scans: str) -> None:
    if scans not in LAYOUTS:
        raise ValueError(f"scans = {scans!r}, expected one of {', '.join(LAYOUTS)}")


@op(check=check_cross_scan)
def cross_scan(x: Tensor, scans: str = "cross") -> Tensor:
    """Lay a map out along four scan directions.

    x        (b c h w)   any strides: a permuted channels-last map is read as it is
    scans                "cross", "unidirectional", "bidirectional" or "paired" (table above)
    returns  (b 4 c l)

    Raises ValueError for another rank or an unknown `scans`.
    """
    h, w = x.shape[-2:]
    at = scan_indices(h, w, scans, x.device)
    return x.flatten(2)[..., at].movedim(-2, 1)


@op(check=check_cross_merge)
def cross_merge(y: Tensor, scans: str = "cross") -> Tensor:
    """Bring four sequences back onto the map and add them: the transpose of `cross_scan`.

    y        (b 4 c h w)  four sequences of length l = h w; the last two axes only say the size of the map
                          (k1 and k3 run down the columns and are nevertheless passed as (h w), as officially)
    returns  (b c l)      in row-major order
    """
    h, w = y.shape[-2:]
    back = scan_indices(h, w, scans, y.device).argsort(dim=-1)  # (4 l)
    return sum(y[:, k].flatten(2)[..., back[k]] for k in range(4))


def scan_indices(h: int, w: int, scans: str, device: torch.device | None = None) -> Tensor:
    """Index on the row-major map of every position of the four sequences, (4 l) integers."""
    rows = torch.arange(h * w, device=device)
    if scans == "unidirectional":
        return torch.stack([rows] * 4)
    second = rows if scans == "bidirectional" else rows.view(h, w).mT.flatten()
    if scans == "paired":
        return torch.stack([rows, rows.flip(0), second, second.flip(0)])
    return torch.stack([rows, second, rows.flip(0), second.flip(0)])


def orders(h: int, w: int, scans: str, device: torch.device | None = None) -> Tensor:
    """Deprecated name of `scan_indices`."""
    warnings.warn("orders is called scan_indices now", DeprecationWarning, stacklevel=2)
    return scan_indices(h, w, scans, device)
