"""Four selective scans of a map, one along each of four orders, and their sum: the core of VMamba's SS2D.

Letters: b batch, e channels, h rows, w columns, l = h w, k = 4 orders, n state size, r rank of the time step.
Source: Liu et al. 2024 (arXiv 2401.10166), section 4; MzeroMiko/VMamba classification/models/vmamba.py.
"""

from __future__ import annotations

import torch

from ssmzoo.ops.checks import expect, expect_floats
from ssmzoo.ops.cross_scan import SCANS, cross_merge, cross_scan
from ssmzoo.ops.dispatch import op
from ssmzoo.ops.selective_scan import selective_scan_fn


def check_cross_selective_scan(x, x_proj, dt_proj, dt_bias, A, D, scans="cross") -> None:
    sizes: dict[str, int] = {"k": 4}
    expect("x", x, ("b", "e", "h", "w"), sizes)
    expect("dt_proj", dt_proj, ("k", "e", "r"), sizes)
    expect("dt_bias", dt_bias, ("k", "e"), sizes)
    sizes["ke"] = 4 * sizes["e"]
    expect("A", A, ("ke", "n"), sizes)
    expect("D", D, ("ke",), sizes)
    sizes["r+2n"] = sizes["r"] + 2 * sizes["n"]
    expect("x_proj", x_proj, ("k", "r+2n", "e"), sizes)
    expect_floats(x.device, x=x, x_proj=x_proj, dt_proj=dt_proj, dt_bias=dt_bias, A=A, D=D)
    if scans not in SCANS:
        raise ValueError(f"scans = {scans!r}, expected one of {', '.join(SCANS)}")


def _in_parts(lay_out, scan, merge, x, x_proj, dt_proj, dt_bias, A, D, scans):
    n, h, w = A.shape[1], *x.shape[2:]
    xs = lay_out(x, scans)  # (b k e l)
    dt, B, C = torch.matmul(x_proj, xs).split([x_proj.shape[1] - 2 * n, n, n], dim=2)
    delta = torch.matmul(dt_proj, dt)  # (b k e l)
    y = scan(xs.flatten(1, 2), delta.flatten(1, 2), A, B, C, D, delta_bias=dt_bias.flatten(), delta_softplus=True)
    y = merge(y.unflatten(1, (4, -1)).unflatten(-1, (h, w)), scans)  # (b e l)
    return y.transpose(1, 2).unflatten(1, (h, w))


@op(check=check_cross_selective_scan, parts=("cross_scan", "selective_scan_fn", "cross_merge"))
def cross_selective_scan(x, x_proj, dt_proj, dt_bias, A, D, scans="cross"):
    """Scan a map along four orders (see `cross_scan`), each with its own projections, and add up the results in place.

        [dt_r, B, C] = x_proj_k x        delta = softplus(dt_proj_k dt_r + dt_bias_k)
        s_t = exp(delta_t A_k) s_{t-1} + delta_t B_t x_t,        y_k = <C_t, s_t> + D_k x_t,        y = sum of the y_k

    x        (b e h w)      any strides; fastest with channels last
    x_proj   (4 r+2n e)     dt_proj (4 e r), dt_bias (4 e), A (4e n) negative, D (4e)
    scans    "cross", "unidirectional" or "bidirectional"
    returns  (b h w e)      in x's dtype; the recurrence runs in fp32 (fp64 if an input is)

    The native backend neither lays the map out in four orders nor keeps time steps: it gathers a few positions at a
    time. Raises ValueError naming the argument, its shape and the one expected.
    """
    return _in_parts(
        cross_scan.reference,
        selective_scan_fn.reference,
        cross_merge.reference,
        x,
        x_proj,
        dt_proj,
        dt_bias,
        A,
        D,
        scans,
    )


@cross_selective_scan.register("torch")
def cross_selective_scan_torch(x, x_proj, dt_proj, dt_bias, A, D, scans="cross"):
    """The operators one after another, each on the fastest backend there is (the scan on a GPU's, for instance)."""
    return _in_parts(cross_scan, selective_scan_fn, cross_merge, x, x_proj, dt_proj, dt_bias, A, D, scans)
