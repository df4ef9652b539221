"""PSNR and SSIM exactly as restoration papers report them, and the studio-swing colour conversions they rest on.

Images are (c y x) tensors of 8-bit levels (0..255, any dtype), c = 3 (RGB) or 1, unless a docstring says otherwise.
Source: BasicSR as used by MambaIR@33d7b34 (`basicsr/metrics/psnr_ssim.py`, `basicsr/utils/matlab_functions.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# ITU-R BT.601 studio swing (MATLAB's rgb2ycbcr): rows Y, Cb, Cr for R, G, B in [0, 1], on the 0..255 scale
TO_YCBCR = ((65.481, 128.553, 24.966), (-37.797, -74.203, 112.0), (112.0, -93.786, -18.214))
YCBCR_OFFSET = (16.0, 128.0, 128.0)
FROM_YCBCR = ((0.00456621, 0.00456621, 0.00456621), (0.0, -0.00153632, 0.00791071), (0.00625893, -0.00318811, 0.0))
RGB_OFFSET = (-222.921, 135.576, -276.836)


def rgb_to_ycbcr(image: Tensor) -> Tensor:
    """RGB levels (3 y x) to unrounded YCbCr levels in float64; Y lies in 16..235."""
    matrix = torch.tensor(TO_YCBCR, dtype=torch.float64, device=image.device)
    offset = torch.tensor(YCBCR_OFFSET, dtype=torch.float64, device=image.device)
    return torch.einsum("ij,jyx->iyx", matrix, image.double() / 255) + offset[:, None, None]


def ycbcr_to_rgb(image: Tensor, wrap: bool = False) -> Tensor:
    """8-bit YCbCr levels (3 y x) to rounded 8-bit RGB levels, the inverse that MATLAB prints (float64).

    wrap  levels outside 0..255 overflow (256 becomes 0) as in the official function, instead of being clipped
    """
    matrix = torch.tensor(FROM_YCBCR, dtype=torch.float64, device=image.device) * 255
    offset = torch.tensor(RGB_OFFSET, dtype=torch.float64, device=image.device)
    rgb = torch.einsum("jyx,ji->iyx", image.double(), matrix) + offset[:, None, None]
    return rgb.round() % 256 if wrap else rgb.round().clamp(0, 255)


def luma(image: Tensor) -> Tensor:
    """Y (1 y x) of RGB levels, not rounded; a one-channel image passes unchanged."""
    return image if image.shape[0] == 1 else rgb_to_ycbcr(image)[:1]


def prepare(image: Tensor, other: Tensor, crop: int, y_channel: bool) -> tuple[Tensor, Tensor]:
    """Both images in float64, cropped by `crop` pixels on every side, on Y if asked."""
    if image.shape != other.shape:
        raise ValueError(f"the images differ in shape: {tuple(image.shape)} and {tuple(other.shape)}")
    height, width = image.shape[-2:]
    if min(height, width) <= 2 * crop:
        raise ValueError(f"a border of {crop} pixels leaves nothing of an image of {height} x {width}")
    pair = (t[..., crop : height - crop, crop : width - crop].double() for t in (image, other))
    return tuple(luma(t) if y_channel else t for t in pair)


def psnr(image: Tensor, other: Tensor, crop: int = 0, y_channel: bool = False) -> float:
    """20 log10(255 / sqrt(MSE)) in dB over all remaining pixels and channels jointly; inf for equal images.

    image, other  (c y x) levels 0..255
    crop          pixels removed on every side: the scale for super-resolution, 0 otherwise
    y_channel     compare luma (super-resolution) instead of RGB
    Raises ValueError for different shapes or a crop that leaves nothing.
    """
    a, b = prepare(image, other, crop, y_channel)
    mse = (a - b).square().mean().item()
    return math.inf if mse == 0 else 10 * math.log10(255**2 / mse)


def gaussian_blur_valid(x: Tensor) -> Tensor:
    """(c y x) filtered with the 11-tap Gaussian of sigma 1.5, valid region only."""
    taps = torch.exp(-((torch.arange(11, dtype=x.dtype, device=x.device) - 5) ** 2) / (2 * 1.5**2))
    taps = taps / taps.sum()
    x = F.conv2d(x[:, None], taps.view(1, 1, 11, 1))
    return F.conv2d(x, taps.view(1, 1, 1, 11))[:, 0]


def _similarity(a: Tensor, b: Tensor, blur: Callable[[Tensor], Tensor]) -> Tensor:
    """The map of structural similarity of two images of levels 0 to 255, with local moments taken by `blur`."""
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mean_a, mean_b = blur(a), blur(b)
    var_a = blur(a * a) - mean_a**2
    var_b = blur(b * b) - mean_b**2
    cov = blur(a * b) - mean_a * mean_b
    return ((2 * mean_a * mean_b + c1) * (2 * cov + c2)) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))


def ssim(image: Tensor, other: Tensor, crop: int = 0, y_channel: bool = False) -> float:
    """Structural similarity, 11 x 11 Gaussian window, valid region, mean over the map and then over channels.

    Arguments as for `psnr`. Raises ValueError when fewer than 11 pixels a side remain.
    """
    a, b = prepare(image, other, crop, y_channel)
    if min(a.shape[-2:]) < 11:
        raise ValueError(f"SSIM needs at least 11 x 11 pixels after cropping, got {a.shape[-2]} x {a.shape[-1]}")
    similarity = _similarity(a, b, gaussian_blur_valid)
    return similarity.mean(dim=(1, 2)).mean().item()


def gaussian_blur_volume(x: Tensor) -> Tensor:
    """(c y x) filtered with the 11-tap Gaussian of sigma 1.5 along all three axes, borders repeated, same size."""
    taps = torch.exp(-((torch.arange(11, dtype=x.dtype, device=x.device) - 5) ** 2) / (2 * 1.5**2))
    taps = taps / taps.sum()
    x = F.pad(x[None, None], (5,) * 6, mode="replicate")
    for shape in ((11, 1, 1), (1, 11, 1), (1, 1, 11)):
        x = F.conv3d(x, taps.view(1, 1, *shape))
    return x[0, 0]


def ssim_volume(image: Tensor, other: Tensor, crop: int = 0, y_channel: bool = False) -> float:
    """SSIM as MATLAB's ssim takes an H x W x 3 array, as one volume: the number reported for SIDD and DND.

    The Gaussian is 11 x 11 x 11, the borders of all three axes are repeated, and the mean runs over every position.
    Arguments as for `psnr`; levels need not be whole numbers.
    """
    a, b = prepare(image, other, crop, y_channel)
    return _similarity(a, b, gaussian_blur_volume).mean().item()
