"""Tokens and positions: vocabulary sizes and rotations of channel pairs."""

from __future__ import annotations

import torch
from torch import Tensor


def padded_vocab_size(vocab_size: int, multiple: int) -> int:
    """`vocab_size` rounded up to a multiple; the extra rows are never targets."""
    if vocab_size < 1 or multiple < 1:
        raise ValueError(
            f"need a positive vocabulary and multiple, got vocab_size={vocab_size}, pad_vocab_size_multiple={multiple}"
        )
    return -(-vocab_size // multiple) * multiple


def rope_angles(positions: Tensor, dim: int, base: float = 10000.0) -> Tensor:
    """positions (...) in tokens -> angles (... dim/2) in radians, position / base^(2i/dim)."""
    i = torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32)
    return positions[..., None].float() * base ** (-i / dim)


def rotate_halves(x: Tensor, angles: Tensor) -> Tensor:
    """Turn channel i with channel i + m, m = size of angles' last axis; channels from 2m on stay. x (... n)"""
    m = angles.shape[-1]
    a, b, rest = x[..., :m], x[..., m : 2 * m], x[..., 2 * m :]
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    return torch.cat([a * cos - b * sin, a * sin + b * cos, rest], dim=-1)


def rotate_pairs(x: Tensor, angles: Tensor) -> Tensor:
    """Turn channels 2i and 2i + 1 by angles[i], i < m; channels from 2m on stay. x (... n), angles (... m)"""
    m = angles.shape[-1]
    a, b = x[..., : 2 * m].unflatten(-1, (m, 2)).unbind(-1)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    turned = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)
    return torch.cat([turned, x[..., 2 * m :]], dim=-1)
