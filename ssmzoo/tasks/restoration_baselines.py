"""What a restoration network must beat: bicubic enlargement, non-local means, or leaving the picture as it is.

Each takes the degraded picture (c y x) in [0, 1], the scale s and the noise level in 8-bit levels; returns (c s*y s*x).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssmzoo.ops.imresize import imresize


def bicubic(lq: Tensor, scale: int, sigma: float | None) -> Tensor:
    return imresize(lq, float(scale))


def nl_means(lq: Tensor, scale: int, sigma: float | None) -> Tensor:
    """Non-local means of scikit-image with its documented settings for a known noise level (h = 0.8 sigma)."""
    from skimage.restoration import denoise_nl_means

    level = sigma / 255
    clean = denoise_nl_means(
        lq.permute(1, 2, 0).cpu().numpy(),
        h=0.8 * level,
        sigma=level,
        patch_size=5,
        patch_distance=6,
        fast_mode=True,
        channel_axis=-1,
    )
    return torch.from_numpy(clean).permute(2, 0, 1)


def none(lq: Tensor, scale: int, sigma: float | None) -> Tensor:
    return lq


BASELINES = {"bicubic": bicubic, "nl_means": nl_means, "none": none}
