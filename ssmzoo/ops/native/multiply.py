"""The product of a matrix, as floats or as small integers, with few vectors on our compiled kernel (matrix.c)."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from ssmzoo.ops.native import kernel

MULTIPLY, MISSING = kernel("ssmzoo_multiply")
DENSE, _ = kernel("ssmzoo_dense")
FLOAT, STATIC, DYNAMIC = range(3)  # what becomes of activations beside integers: see `prepare` in matrix.h
ACTIVATIONS = ("float", "static", "dynamic")  # their names


def packed(
    weight: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    zero: Tensor | None = None,
    bits: int = 32,
    group_size: int = 0,
    activation: str = "float",
    act_scale: Tensor | None = None,
    rounded: Tensor | None = None,
) -> tuple[int, ...]:
    """A `matrix` of matrix.h; its tensors must stay alive. The last three are for programs: `multiply` has its own."""
    rows, columns = weight.shape
    columns *= 2 if bits == 4 else 1
    group = columns if scale is None or scale.shape[1] == 1 else group_size
    pointers = [0 if t is None else t.data_ptr() for t in (weight, scale, zero, bias, rounded, act_scale)]
    return *pointers[:4], rows, columns, bits, group, *pointers[4:], ACTIVATIONS.index(activation)


def multiply(x: Tensor, matrix: tuple[int, ...], act: int = FLOAT, act_scale: float = 0.0) -> Tensor:
    """x (... d) fp32 contiguous -> (... e); `matrix` by `packed`, act_scale: of `STATIC` activations"""
    y = x.new_empty(*x.shape[:-1], matrix[4])
    count = x.numel() // matrix[5]
    values = x.data_ptr(), *matrix, y.data_ptr(), count, act, torch.get_num_threads(), act_scale
    MULTIPLY(struct.pack("16qd", *values))
    return y


def dense(matrix: tuple[int, ...]) -> Tensor:
    """The matrix (e d) that integers and scales stand for, fp32."""
    weight = torch.empty(matrix[4], matrix[5])
    DENSE(struct.pack("13q", *matrix, weight.data_ptr(), torch.get_num_threads()))
    return weight
