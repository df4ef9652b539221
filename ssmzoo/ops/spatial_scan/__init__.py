"""The core of Spatial-Mamba's mixer: one raster scan, its states fused with their neighbours, then read out.

Letters: b batch, h rows, w columns, e channels, r rank of the time step; one state per channel.
Source: Xiao et al. 2024 (arXiv 2410.15091), section 3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmzoo.ops.checks import expect_floats
from ssmzoo.ops.dispatch import op
from ssmzoo.ops.selective_scan import selective_scan_fn
from ssmzoo.ops.state_fusion import check_state_fusion, state_fusion


def check_spatial_scan(a) -> None:
    sizes = expect_floats(a, {"1": 1}, u="bhwe", dt_proj="er", dt_bias="e", A="e1", D="e")
    sizes["r+2"] = sizes["r"] + 2
    expect_floats(a, sizes, steps=("b", "h", "w", "r+2"))
    if a.kernels is not None:
        check_state_fusion(state_fusion.Arguments(a.u.permute(0, 3, 1, 2), a.kernels, a.alpha))


@op(check=check_spatial_scan, parts=("selective_scan_fn", "state_fusion"))
def spatial_scan(
    u: Tensor,
    steps: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    kernels: tuple[Tensor, Tensor, Tensor] | None,
    alpha: Tensor | None,
) -> Tensor:
    """Scan a map by rows, fuse the states (see `state_fusion`), and read them out.

        delta_t = softplus(dt_proj dt_t + dt_bias)      x_t = exp(delta_t A) x_{t-1} + delta_t B_t u_t
        y_t = C_t fused(x)_t + D u_t                    steps = [dt | B | C]

    u        (b h w e)     steps (b h w r+2)
    dt_proj  (e r), dt_bias (e), A (e 1) negative, D (e)
    kernels, alpha  as in `state_fusion`; None: states are read out as they are
    returns  (b h w e)     in the widest of the inputs' dtypes; the recurrence runs in fp32 (fp64 if an input is)

    The C backend keeps the states of eleven rows in cache and writes nothing but y; its backward scans anew.
    Raises ValueError naming the argument, its shape and the one expected.
    """
    delta, x, B, C = sequences(u, steps, dt_proj)
    states = selective_scan_fn.reference(x, delta, A, B, torch.ones_like(A), delta_bias=dt_bias, delta_softplus=True)
    h = states.unflatten(2, u.shape[1:3])
    h = h if kernels is None else state_fusion.reference(h, kernels, alpha)
    return h.permute(0, 2, 3, 1) * C + D * u


def sequences(u: Tensor, steps: Tensor, dt_proj: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Time step and input of the scan (b e l), its B (b 1 l), and C (b h w 1)."""
    dt, B, C = steps.split([dt_proj.shape[1], 1, 1], dim=-1)  # (b h w r), (b h w 1) twice
    delta = F.linear(dt, dt_proj.to(dt.dtype))
    return *(t.flatten(1, 2).transpose(1, 2) for t in (delta, u, B)), C
