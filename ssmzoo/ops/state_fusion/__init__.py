"""Structure-aware state fusion (Spatial-Mamba): every state of a 2-D map becomes a weighted sum of its neighbours.

    y[i, j] = sum over d in (1, 3, 5), r, s in (-1, 0, 1) of  alpha_d K_d[r, s] x[clamp(i + d r), clamp(j + d s)]

that is three depthwise 3x3 correlations of dilation 1, 3 and 5 on a map that is continued by its border values, each
scaled by one learned number. Since the clamping is the same for all three, they are one sparse 11x11 correlation with
25 taps (the centres coincide).

Letters: b batch, d channels, h rows, w columns.
Source: Xiao et al. 2024 (arXiv 2410.15091), section 3.3; EdwardChasel/Spatial-Mamba classification/models/
spatialmamba.py and kernels/dwconv2d.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssmzoo.ops.checks import compute_dtype, expect_floats
from ssmzoo.ops.dispatch import op

DILATIONS = (1, 3, 5)


def check_state_fusion(a) -> None:
    sizes = expect_floats(a, {}, x="bdhw", alpha="...")
    if len(a.kernels) != 3:
        raise ValueError(f"kernels has {len(a.kernels)} entries, expected 3: one for each dilation in {DILATIONS}")
    for dilation, kernel in zip(DILATIONS, a.kernels):
        name = f"the kernel of dilation {dilation}"
        if tuple(kernel.shape) not in ((sizes["d"], 1, 3, 3), (sizes["d"], 3, 3)):
            raise ValueError(f"{name} has shape {tuple(kernel.shape)}, expected ({sizes['d']}, 1, 3, 3)")
        if kernel.device != a.x.device or not kernel.is_floating_point():
            raise ValueError(f"{name} is {kernel.dtype} on {kernel.device}, expected real numbers on {a.x.device}")
    if tuple(a.alpha.shape) != (3,):
        raise ValueError(f"alpha has shape {tuple(a.alpha.shape)}, expected (3,)")
    if sizes["h"] == 0 or sizes["w"] == 0:
        raise ValueError(f"x has shape {tuple(a.x.shape)}: an empty map has no border to continue")


def taps(kernels, alpha: Tensor, dtype: torch.dtype) -> Tensor:
    """alpha_d K_d for the three dilations, (d 3 3 3): channel, dilation, row, column."""
    kernels = torch.stack([k.reshape(-1, 3, 3).to(dtype) for k in kernels], dim=1)
    return kernels * alpha.to(dtype).view(1, 3, 1, 1)


@op(check=check_state_fusion)
def state_fusion(x: Tensor, kernels: tuple[Tensor, Tensor, Tensor], alpha: Tensor) -> Tensor:
    """Fuse the states of a map with their dilated neighbourhoods.

    x        (b d h w)    states in raster order; any strides
    kernels  three of (d 1 3 3) or (d 3 3), for dilation 1, 3 and 5
    alpha    (3)          one weight per dilation, shared by all channels
    returns  (b d h w)    in x's dtype; sums are taken in fp32 (float64 for float64 input)

    Raises ValueError naming the argument, its shape and the one expected.
    """
    h, w = x.shape[-2:]
    rows, columns = torch.arange(h, device=x.device), torch.arange(w, device=x.device)
    dtype = compute_dtype(x)
    weight, x32, y = taps(kernels, alpha, dtype), x.to(dtype), 0
    for k, dilation in enumerate(DILATIONS):
        for r in range(3):
            for s in range(3):
                i = (rows + dilation * (r - 1)).clamp(0, h - 1)
                j = (columns + dilation * (s - 1)).clamp(0, w - 1)
                y = y + weight[:, k, r, s].view(1, -1, 1, 1) * x32[:, :, i][..., j]
    return y.to(x.dtype)
