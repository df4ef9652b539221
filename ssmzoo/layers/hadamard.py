"""Rotations by Hadamard matrices: every channel becomes a sum, with signs, of all channels.

    y = x T,   T = kron(H_s, H_2^k)^T / sqrt(d),   T T^T = 1

d = 2^k, 12 2^k or 40 2^k; the special factor H_s (12 or 40) acts on the slow index. H_12 is symmetric, H_40 is not.
What stands out in one channel is spread over all of them, so that few bits hold it. T is applied as two small matrix
products, at d sqrt(d) operations instead of d^2.
Source: Chiang et al. 2025 (arXiv 2503.22879); Paley 1933 for the matrices of order 12 and 20.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssmzoo.layers.norm import fp32
from ssmzoo.ops import rms_norm
from ssmzoo.ops.token_step import Register

SPECIAL = (12, 40)


def order(dim: int) -> tuple[int, int] | None:
    """(special factor or 1, power of two) whose product is `dim`; None when there is no such matrix."""
    factor = next((s for s in SPECIAL if dim % s == 0), 1)
    rest = dim // factor
    return (factor, rest) if dim > 0 and rest & (rest - 1) == 0 else None


def expect_order(name: str, dim: int) -> None:
    """Raise ValueError naming the nearest widths that have a Hadamard matrix."""
    if order(dim) is None:
        near = sorted((d for d in range(1, 2 * dim + 40) if order(d)), key=lambda d: abs(d - dim))[:2]
        raise ValueError(
            f"{name} = {dim} has no Hadamard matrix (2^k, 12 2^k or 40 2^k; the nearest are {sorted(near)}); "
            "quantise without rotation (--no-rotate, rotate=False)"
        )


@functools.cache
def hadamard_matrix(n: int) -> Tensor:
    """(n n) of +1 and -1, float64, with orthogonal rows: n a power of two, 12, 20 or 40."""
    if n == 12:  # Paley's second construction over 5 elements
        C = F.pad(_jacobsthal(5), (1, 0, 1, 0), value=1.0)
        C[0, 0] = 0
        pair, diagonal = torch.tensor([[1.0, 1], [1, -1]]), torch.tensor([[1.0, -1], [-1, -1]])
        return torch.kron(C, pair.double()) + torch.kron(torch.eye(6).double(), diagonal.double())
    if n == 20:  # his first over 19
        H = F.pad(torch.eye(19).double() - _jacobsthal(19), (1, 0, 1, 0), value=1.0)
        H[0, 1:] = -1
        return H
    if n == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    return torch.kron(torch.tensor([[1.0, 1], [1, -1]]).double(), hadamard_matrix(n // 2))


def _jacobsthal(q: int) -> Tensor:
    """Q_ij = 1 where j - i is a square modulo the prime q, -1 where it is none, 0 on the diagonal"""
    squares = {i * i % q for i in range(1, q)}
    row = [0.0] + [1.0 if i in squares else -1.0 for i in range(1, q)]
    return torch.tensor([[row[(j - i) % q] for j in range(q)] for i in range(q)], dtype=torch.float64)


@functools.cache
def special_factor(dim: int) -> Tensor:
    """H_s (s s) in fp32 on the CPU, (1 1) for a power of two: what a kernel needs to know of T."""
    return hadamard_matrix(order(dim)[0]).float()


@functools.cache
def _factors(dim: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """(outer, inner) matrices whose Kronecker product, transposed and normalised, is T."""
    factor, rest = order(dim)
    outer = factor
    while factor == 1 and outer * outer < rest:  # 2^k as two factors of nearly the same size
        outer *= 2
    inner = rest if factor > 1 else rest // outer
    A, B = hadamard_matrix(outer) / outer**0.5, hadamard_matrix(inner) / inner**0.5
    return A.to(device, dtype), B.to(device, dtype)


def hadamard(x: Tensor, inverse: bool = False) -> Tensor:
    """x (... d) -> x T, or x T^T; raises ValueError for a d without a matrix."""
    dim = x.shape[-1]
    expect_order("the width", dim)
    A, B = _factors(dim, x.dtype, x.device)
    A, B = (A.T, B.T) if inverse else (A, B)
    return (A @ (x.unflatten(-1, (len(A), len(B))) @ B.T)).flatten(-2)


class HadamardLinear(nn.Linear):
    """A linear map whose weight expects rotated inputs: y = (x T) W^T + bias"""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(hadamard(x), self.weight, self.bias)


class CentredNorm(nn.Module):
    """LayerNorm without affine part, of vectors that were rotated: y = LN(x T^T) T. (... dim) -> (... dim)

    The mean of the channels is the component along the rotated vector of ones; it is taken out, then RMSNorm.
    """

    def __init__(self, dim: int, eps: float = 1e-5):
        super().__init__()
        self.dim, self.eps = dim, eps
        self.register_buffer("ones", hadamard(torch.ones(dim, dtype=torch.float64) / dim**0.5).float())
        self.register_buffer("weight", torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        x, ones = fp32(x), self.ones.to(torch.promote_types(x.dtype, torch.float32))
        return rms_norm(x - (x @ ones)[..., None] * ones, self.weight.to(x.dtype), self.eps).to(self.weight.dtype)

    def program(self, p: Any, x: Register) -> Register:
        return p.normalise(x, self.weight, self.ones, self.eps, layer=2)

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}"


class Rotated(nn.Module):
    """A norm that keeps its weights, of vectors that were rotated: y = norm(x T^T) T. (... d) -> (... d)"""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return hadamard(self.norm(hadamard(fp32(x), inverse=True)))

    def program(self, p: Any, x: Register) -> Register:
        return p.rotate(p.norm(self.norm, p.rotate(x, inverse=True)))
