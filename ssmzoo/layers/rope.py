"""Rotary positions: pairs of channels rotated by an angle that grows with the position.

    angle_i = position / base^(2i/width) radians;   (a, b) -> (a cos - b sin, a sin + b cos)

Source: Su et al. 2021 (arXiv 2104.09864), section 3.4.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rope_table(
    positions: Tensor, width: int, base: float = 10000.0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """positions (...) in tokens -> cos and sin (... width/2) of their angles, in `dtype` but at least fp32."""
    wide = torch.promote_types(dtype, torch.float32)
    frequency = base ** (-torch.arange(0, width, 2, device=positions.device, dtype=wide) / width)
    angle = positions.to(wide)[..., None] * frequency
    return angle.cos(), angle.sin()
