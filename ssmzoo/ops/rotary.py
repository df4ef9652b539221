"""Pairs of channels turned by an angle: (a, b) -> (a cos - b sin, a sin + b cos), as rotary positions do."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotate channel i with channel i + m, or 2i with 2i + 1 when interleaved; channels from 2m on stay.

    x (... n), cos and sin (... m) -> (... n) in x's dtype
    """
    m = cos.shape[-1]
    if interleaved:
        a, b = x[..., : 2 * m].unflatten(-1, (m, 2)).unbind(-1)
        rotated = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)
    else:
        a, b = x[..., :m], x[..., m : 2 * m]
        rotated = torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
    rotated = rotated.to(x.dtype)
    return rotated if 2 * m == x.shape[-1] else torch.cat([rotated, x[..., 2 * m :]], dim=-1)
