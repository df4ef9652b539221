"""Degradations and their conventions: Gaussian noise, JPEG, grey, rounding to 8 bits (resampling: ssmzoo.ops.imresize).

Images here are float tensors (..., y, x) with values in [0, 1]; the last two axes are rows and columns.
Source: BasicSR as used by MambaIR@33d7b34 (`basicsr/data/paired_image_dataset.py`, `basicsr/utils/img_util.py`).
"""

from __future__ import annotations

import io

import numpy as np
import torch
from torch import Tensor


def to_uint8(image: Tensor) -> Tensor:
    """Network output to 8-bit levels: clamp to [0, 1], times 255, round half to even."""
    return (image.clamp(0, 1) * 255).round().to(torch.uint8)


def gaussian_noise(image: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    """image (... y x) plus N(0, (sigma / 255)^2), neither clipped nor rounded; sigma in 8-bit levels."""
    return image + torch.randn(image.shape, generator=generator, dtype=image.dtype) * (sigma / 255)


def benchmark_noise(image: Tensor, sigma: float) -> Tensor:
    """The published evaluation's noise, the same for every image of a size: (c y x) in [0, 1] to float32.

    NumPy's legacy generator seeded with 0 draws (y, x, c) in double precision; channels are laid on in the order BGR.
    """
    channels, height, width = image.shape
    state = np.random.RandomState(0)
    shape = (height, width, channels) if channels > 1 else (height, width)
    noise = torch.from_numpy(state.normal(0, sigma / 255, shape)).reshape(height, width, channels)
    return (image.double() + noise.flip(-1).permute(2, 0, 1)).float()


def jpeg(image: Tensor, quality: int) -> Tensor:
    """Through a JPEG file and back: (c y x) in [0, 1], c = 1 (luminance) or 3 (YCbCr 4:2:0), to 8-bit levels / 255.

    quality  libjpeg's scale, 1 (worst) to 100
    """
    from PIL import Image

    if not 1 <= quality <= 100:
        raise ValueError(f"JPEG quality is {quality}; it must lie between 1 and 100")
    levels = to_uint8(image).permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(levels.squeeze(-1) if levels.shape[-1] == 1 else levels).save(buffer, "JPEG", quality=quality)
    back = torch.from_numpy(np.array(Image.open(buffer)))
    return back.reshape(levels.shape).permute(2, 0, 1).float() / 255


def grey(image: Tensor) -> Tensor:
    """RGB (3 y x) in [0, 1] to grey (1 y x) in [0, 1], with OpenCV's 15-bit weights on 8-bit levels."""
    red, green, blue = to_uint8(image).int()
    return ((9798 * red + 19235 * green + 3735 * blue + (1 << 14)) >> 15).float()[None] / 255
