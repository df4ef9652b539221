"""MATLAB's bicubic imresize and the crop that goes before it: the resampling that restoration benchmarks are built on.

torch's bicubic (a = -0.75, no antialiasing) and Pillow's (other edges) give other pixels; published numbers need this.
Source: BasicSR as used by MambaIR@33d7b34 (`basicsr/utils/matlab_functions.py`), re-implemented from the definition.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from ssmzoo.ops.eager import eager


def keys_cubic(t: Tensor) -> Tensor:
    """Keys' cubic convolution kernel with a = -0.5, support [-2, 2]."""
    t = t.abs()
    near = 1.5 * t**3 - 2.5 * t**2 + 1
    far = -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2
    return torch.where(t <= 1, near, torch.where(t <= 2, far, torch.zeros_like(t)))


def resize_taps(length: int, scale: float, antialias: bool = True) -> tuple[Tensor, Tensor]:
    """Indices (m p) int64 and weights (m p) float64 that resize an axis of `length` by `scale`; m = ceil(length scale).

    Output i (from 1) samples u = i / s + (1 - 1 / s) / 2; when s < 1 the kernel is stretched by 1 / s (antialias).
    Indices outside are reflected with the edge repeated.
    """
    out = length * int(scale) if scale == int(scale) else math.ceil(length * scale)  # no ceil of a traced length
    stretch = scale if antialias and scale < 1 else 1.0
    width = 4 / stretch
    taps = math.ceil(width) + 2
    u = torch.arange(1, out + 1, dtype=torch.float64) / scale + 0.5 * (1 - 1 / scale)
    at = torch.floor(u - width / 2)[:, None] + torch.arange(taps)[None, :]  # 1-based
    weights = keys_cubic(stretch * (u[:, None] - at))
    weights = weights / weights.sum(dim=1, keepdim=True)
    period = (at.long() - 1) % torch.full((), 2 * length)  # a tensor: exporters know no number that depends on a size
    return torch.minimum(period, 2 * length - 1 - period), weights


@functools.lru_cache(maxsize=64)
def kept_taps(length: int, scale: float, antialias: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """`resize_taps` without the taps that no output needs, where the images lie: copied there once."""
    index, weights = resize_taps(length, scale, antialias)
    used = (weights != 0).any(dim=0)
    return index[:, used].to(device), weights[:, used].to(device)


def imresize(image: Tensor, scale: float, antialias: bool = True) -> Tensor:
    """MATLAB's imresize with the bicubic kernel, rows first and then columns.

    image    (... y x) float; not rounded and not clipped inside
    returns  (... ceil(y scale) ceil(x scale)) in the same dtype

    Raises ValueError for a scale that is not positive and for integer images.
    """
    if scale <= 0:
        raise ValueError(f"scale is {scale}; it must be positive")
    if not image.is_floating_point():
        raise ValueError(f"imresize takes floating-point images in [0, 1], got {image.dtype}; divide by 255 first")
    for dim in (-2, -1):
        if eager(image):
            index, weight = kept_taps(image.shape[dim], float(scale), antialias, image.device)
        else:  # what a trace makes must not be kept
            index, weight = (t.to(image.device) for t in resize_taps(image.shape[dim], float(scale), antialias))
        moved = image.movedim(dim, -1)
        moved = (moved[..., index] * weight.to(image.dtype)).sum(dim=-1)
        image = moved.movedim(-1, dim)
    return image


def mod_crop(image: Tensor, scale: int) -> Tensor:
    """Cut (... y x) at the bottom and right to a multiple of `scale`."""
    height, width = image.shape[-2:]
    return image[..., : height - height % scale, : width - width % scale]
