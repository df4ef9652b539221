"""A linear map whose weights are small integers with scales, of 8 bits, or of 4 bits packed two to a byte.

Letters: d inputs, e outputs, m groups of `group_size` neighbouring inputs that share a scale per output (the last
group may be shorter).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssmzoo.ops.checks import compute_dtype, expect, expect_floats
from ssmzoo.ops.dispatch import op

DYNAMIC = "dynamic"  # act_scale: every token by its own largest magnitude
LEAST_SCALE = 1e-6  # of activations, so that a row of zeros divides by something


def pack_int4(codes: Tensor) -> Tensor:
    """Integers of -8 .. 7 (... d), d even -> uint8 (... d/2): value + 8, the even column in the low four bits."""
    if codes.shape[-1] % 2:
        raise ValueError(f"4-bit values are packed in pairs: {codes.shape[-1]} columns are odd; pad to an even number")
    nibbles = (codes.to(torch.int16) + 8).to(torch.uint8)
    return nibbles[..., ::2] | nibbles[..., 1::2] << 4


def unpack_int4(packed: Tensor) -> Tensor:
    """uint8 (... d/2) -> int8 (... d), values -8 .. 7"""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2).to(torch.int8) - 8


def quantize_activation(x: Tensor, act_scale: Tensor | float | str) -> tuple[Tensor, Tensor | float]:
    """x (... d) -> integers -128 .. 127 as floats, the scale (a number, or (... 1) for "dynamic").

    s = max|x| / 127 of a token, at least 1e-6, or the number given; q = clamp(round(x / s)), halves to even.
    """
    if isinstance(act_scale, str):
        act_scale = (x.detach().abs().amax(-1, keepdim=True) / 127).clamp_min(LEAST_SCALE)
    return torch.round(x / act_scale).clamp(-128, 127), act_scale


def seen(x: Tensor, act_scale: Tensor | float | str | None) -> Tensor:
    """The activations that the product sees: x, or what its 8-bit integers stand for. Gradients pass straight."""
    if act_scale is None:
        return x
    q, scale = quantize_activation(x.detach(), act_scale)
    return (q * scale).to(x.dtype) + (x - x.detach())


def dequantize(weight: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group_size: int) -> Tensor:
    """The matrix (e d) that integers and scales stand for, in scale's dtype."""
    codes = (unpack_int4(weight) if bits == 4 else weight).to(scale.dtype)
    if scale.shape[1] > 1:
        scale, zero = (
            None if t is None else t.repeat_interleave(group_size, 1)[:, : codes.shape[1]] for t in (scale, zero)
        )
    return (codes if zero is None else codes - zero) * scale


def check_quantized_linear(a) -> None:
    if a.bits not in (4, 8):
        raise ValueError(f"bits = {a.bits!r}, expected 8 (int8 weights) or 4 (uint8 weights, two values per byte)")
    kind = torch.int8 if a.bits == 8 else torch.uint8
    if a.weight.dtype != kind or a.weight.ndim != 2:
        shape = f"{str(a.weight.dtype).removeprefix('torch.')} {tuple(a.weight.shape)}"
        wanted = "int8 (e, d)" if a.bits == 8 else "uint8 (e, d/2), two values per byte"
        raise ValueError(f"weight is {shape}; bits = {a.bits} wants {wanted}")
    e, d = a.weight.shape[0], a.weight.shape[1] * (2 if a.bits == 4 else 1)
    if a.x.ndim < 1 or a.x.shape[-1] != d:
        raise ValueError(f"x has shape {tuple(a.x.shape)}, expected (..., {d}) for a weight of {d} inputs")
    if isinstance(a.group_size, bool) or not isinstance(a.group_size, int) or a.group_size < 1:
        raise ValueError(f"group_size = {a.group_size!r}, expected a number of inputs, such as 128, or {d} for all")
    m = max(1, -(-d // a.group_size))
    sizes = {"e": e, "m": m}
    expect_floats(a, sizes, x="...", scale="em", zero="em", bias="e")
    s = a.act_scale
    if isinstance(s, Tensor):
        expect("act_scale", s, (), {})
    elif not (s is None or s == DYNAMIC or isinstance(s, (int, float)) and not isinstance(s, bool) and s > 0):
        raise ValueError(f"act_scale = {s!r}, expected None, a positive number, a tensor without axes, or {DYNAMIC!r}")
    if a.weight.device != a.x.device:
        raise ValueError(f"weight is on {a.weight.device}, expected {a.x.device}, where the first argument lies")


@op(check=check_quantized_linear)
def quantized_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    bits: int = 8,
    group_size: int = 128,
    act_scale: Tensor | float | str | None = None,
) -> Tensor:
    """y_i = sum_j x_j (q_ij - zero_ig) scale_ig + bias_i,   g = j // group_size the group of input j

    x          (... d) float
    weight     q: int8 (e d) for bits = 8; uint8 (e d/2) for bits = 4, two values q + 8 per byte, the even column in
               the low four bits
    scale      (e m), m = ceil(d / group_size): one per output and group; (e 1) with group_size = d for one per output
    zero       (e m) the integer, or number, that stands for 0; None: 0
    bias       (e)
    act_scale  None: x is used as it is. Otherwise x becomes s round(x / s), an 8-bit integer in -128 .. 127 times s: a
               number (or a tensor without axes) is s for all; "dynamic" takes s = max|x| / 127 for every token, at
               least 1e-6. Halves are rounded to even; gradients pass straight through the rounding
    returns    (... e) in x's dtype; sums in fp32 (fp64 for fp64 x), or in integers where both sides are

    Raises ValueError for shapes, dtypes and settings that do not fit. Weights and scales have no gradients in kernels.
    Source: the weight formats of Chiang et al. 2025 (arXiv 2503.22879) and Frantar et al. 2023 (arXiv 2210.17323).
    """
    dtype = compute_dtype(x, scale)
    W = dequantize(weight, scale.to(dtype), None if zero is None else zero.to(dtype), bits, group_size)
    y = (seen(x.to(dtype), act_scale).unsqueeze(-2) * W).sum(-1)
    return (y if bias is None else y + bias.to(dtype)).to(x.dtype)
