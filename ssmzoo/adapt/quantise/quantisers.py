"""Weights as small integers: q = clamp(round(w / s)), symmetric, halves to even.

                 scale s                     codes               one s per
    eight_bit    max|w| / 127                -127 .. 127         row (or part of the rows, or tensor)
    four_bit     2 max|w| / 15               -8 .. 7             row and group of inputs; the largest positive weight
                                                                 of a group is clipped by half a step
    four_bit of one group (d <= group)       max|w| / 7          -7 .. 7, the other rule of the same source

Letters: e outputs, d inputs, m groups. Source: Chiang et al. 2025 (arXiv 2503.22879) and its released code.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LEAST_MAX = 1e-5


class Codes(NamedTuple):
    """q int8 (e d), scale (e m) fp32 for groups of `group_size` inputs"""

    q: Tensor
    scale: Tensor
    group_size: int

    def values(self) -> Tensor:
        """(e d) what the integers stand for"""
        scale = self.scale
        if scale.shape[1] > 1:
            scale = scale.repeat_interleave(self.group_size, 1)[:, : self.q.shape[1]]
        return self.q * scale


def per_tensor(w: Tensor, bits: int = 8, clip: float = 1.0) -> tuple[Tensor, Tensor]:
    """int8 codes in the shape of w, and one scale clip * max|w| / (2^(bits-1) - 1)."""
    top = 2 ** (bits - 1) - 1
    scale = clip * w.abs().max().clamp_min(LEAST_MAX) / top
    return torch.round(w / scale).clamp(-top - 1, top).to(torch.int8), scale


def eight_bit(w: Tensor, parts: Tensor | None = None) -> Codes:
    """w (e d), parts (e): rows of one number share a scale; None: every row its own."""
    most = w.abs().amax(1)
    if parts is not None:
        most = most.new_zeros(int(parts.max()) + 1).scatter_reduce(0, parts, most, "amax")[parts]
    scale = (most.clamp_min(LEAST_MAX) / 127)[:, None]
    return Codes(torch.round(w / scale).clamp(-128, 127).to(torch.int8), scale.float(), w.shape[1])


def group_scales(w: Tensor, bits: int, group_size: int) -> Tensor:
    """2 max|w| / (2^bits - 1) of every row and group, (e m); groups of zeros get a scale that changes nothing."""
    pieces = [piece.abs().amax(1) for piece in w.split(group_size, dim=1)]
    return torch.stack(pieces, dim=1) * (2 / (2**bits - 1))


def to_codes(w: Tensor, scale: Tensor, bits: int) -> Tensor:
    """clamp(round(w / s) + 2^(b-1), 0, 2^b - 1) - 2^(b-1), and 0 where the scale is 0"""
    half = 2 ** (bits - 1)
    return torch.nan_to_num(torch.round(w / scale), nan=0.0).clamp(-half, half - 1)


def four_bit(w: Tensor, group_size: int = 128) -> Codes:
    """w (e d) in groups of inputs, of which the last may be shorter."""
    scale = group_scales(w, 4, group_size)
    wide = scale.repeat_interleave(group_size, 1)[:, : w.shape[1]]
    return Codes(to_codes(w, wide, 4).to(torch.int8), scale.float(), group_size)


def four_bit_one_group(w: Tensor) -> Codes:
    """w (e d), one scale max|w| / 7 per row, codes -7 .. 7."""
    scale = w.abs().amax(1, keepdim=True) / 7
    return Codes(torch.nan_to_num(torch.round(w / scale), nan=0.0).clamp(-7, 7).to(torch.int8), scale, w.shape[1])


class TwoLevels(NamedTuple):
    """4-bit codes (e d) as 8-bit integers for an integer product: int8 (e d) times s_channel (e 1)

    s_group (e m) takes a code to its int8 value; None with one group, whose int8 value is 16 q
    """

    q: Tensor
    s_group: Tensor | None
    s_channel: Tensor
    int8: Tensor


def two_levels(w: Tensor, group_size: int | None = 128) -> TwoLevels:
    """W4A8: four_bit, then rows to 8 bits by max|dequantised row| / 127; group_size None: the rule of one group."""
    if group_size is None:
        codes = four_bit_one_group(w)
        return TwoLevels(codes.q, None, codes.scale / 16, codes.q * 16)
    codes = four_bit(w, group_size)
    values = codes.values().to(w.dtype)
    channel = values.abs().amax(1, keepdim=True) / 127
    int8 = torch.round(values / channel).clamp(-128, 127).to(torch.int8)
    return TwoLevels(codes.q, (codes.scale / channel).half(), channel.float(), int8)


def embedding_rows(w: Tensor, bits: int, signed_maximum: bool = False) -> Codes:
    """w (v d), one scale per row: max|w| / 127 or / 7; signed_maximum: max(w) / 127 or / 8, as the released code has
    it, which clips rows whose largest magnitude is negative and breaks rows without a positive number."""
    low, high = (-128, 127) if bits == 8 else (-8, 7)
    if signed_maximum:
        scale = w.amax(1, keepdim=True) / (127 if bits == 8 else 8)
    else:
        scale = w.abs().amax(1, keepdim=True).clamp_min(LEAST_MAX) / high
    q = (torch.round(w / scale - low).clamp(0, high - low) + low) if bits == 4 else torch.round(w / scale)
    return Codes(q.clamp(low, high).to(torch.int8), scale.float(), w.shape[1])
