"""Four selective scans of a map, one along each of four directions, and their sum: the core of VMamba's SS2D.

Letters: b batch, e channels, h rows, w columns, l = h w, k = 4 directions, n state size, r rank of the time step.
Source: Liu et al. 2024 (arXiv 2401.10166), section 4; MzeroMiko/VMamba classification/models/vmamba.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssmzoo.ops.checks import expect_floats
from ssmzoo.ops.cross_scan import SCANS, cross_merge, cross_scan
from ssmzoo.ops.dispatch import op
from ssmzoo.ops.selective_scan import selective_scan_fn


def check_cross_selective_scan(a) -> None:
    sizes = expect_floats(a, {"k": 4}, x="behw", dt_proj="ker", dt_bias="ke")
    sizes["4e"] = 4 * sizes["e"]
    expect_floats(a, sizes, A=("4e", "n"), D=("4e",))
    sizes["r+2n"] = sizes["r"] + 2 * sizes["n"]
    expect_floats(a, sizes, x_proj=("k", "r+2n", "e"))
    if a.scans not in SCANS:
        raise ValueError(f"scans = {a.scans!r}, expected one of {', '.join(SCANS)}")


@op(check=check_cross_selective_scan, parts=("cross_scan", "selective_scan_fn", "cross_merge"))
def cross_selective_scan(
    x: Tensor, x_proj: Tensor, dt_proj: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor, scans: str = "cross"
) -> Tensor:
    """Scan a map along four directions (see `cross_scan`), each with its own projections, and add up the results.

        [dt_r, B, C] = x_proj_k x        delta = softplus(dt_proj_k dt_r + dt_bias_k)
        s_t = exp(delta_t A_k) s_{t-1} + delta_t B_t x_t,        y_k = <C_t, s_t> + D_k x_t,        y = sum of the y_k

    x        (b e h w)      any strides; fastest with channels last
    x_proj   (4 r+2n e)     dt_proj (4 e r), dt_bias (4 e), A (4e n) negative, D (4e)
    scans    "cross", "unidirectional" or "bidirectional"
    returns  (b h w e)      in x's dtype; the recurrence runs in fp32 (fp64 if an input is)

    The C backend neither lays the map out in four sequences nor keeps time steps: it gathers a few positions at a
    time. Raises ValueError naming the argument, its shape and the one expected.
    """
    xs = cross_scan.reference(x, scans)  # (b k e l)
    dt, B, C = project(xs, x_proj, A.shape[1])
    delta = torch.matmul(dt_proj, dt)  # (b k e l)
    y = selective_scan_fn.reference(
        xs.flatten(1, 2), delta.flatten(1, 2), A, B, C, D, delta_bias=dt_bias.flatten(), delta_softplus=True
    )
    y = cross_merge.reference(y.unflatten(1, (4, -1)).unflatten(-1, x.shape[2:]), scans)  # (b e l)
    return y.transpose(1, 2).unflatten(1, x.shape[2:])


def project(xs: Tensor, x_proj: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Time steps (b k r l), B and C (b k n l) of the four sequences xs (b k e l)."""
    return torch.matmul(x_proj, xs).split([x_proj.shape[1] - 2 * n, n, n], dim=2)
