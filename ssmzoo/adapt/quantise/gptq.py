"""GPTQ: weights are rounded column by column, and the columns still to come make up for the error.

    H = 2/n sum x x^T,  damped by a share of its mean diagonal;   U upper Cholesky factor of H^-1
    for every column j:   e = (w_j - value(q_j)) / U_jj;   w_k <- w_k - e U_jk  for k > j

Scales of a group are those of the corrected weights where the group begins. Inputs that were always zero get weight 0.
Source: Frantar et al. 2023 (arXiv 2210.17323), without reordering of the columns; n counts sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssmzoo.adapt.quantise.quantisers import Codes, group_scales, to_codes

BLOCK = 128  # columns that are corrected one by one before the others learn of it


class Hessian:
    """H (d d) in fp32 of the inputs of one linear layer, batch by batch."""

    def __init__(self, inputs: int):
        self.sum, self.sequences = torch.zeros(inputs, inputs), 0

    def update(self, x: Tensor) -> None:
        """x (b l d), or (l d) as one sequence"""
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        self.sum.addmm_(rows.T, rows)
        self.sequences += len(x) if x.ndim == 3 else 1

    @property
    def value(self) -> Tensor:
        return 2 / max(1, self.sequences) * self.sum


@torch.no_grad()
def gptq(
    w: Tensor, H: Tensor, bits: int = 4, group_size: int = 128, damping: float = 0.01, half: bool = False
) -> Codes:
    """w (e d), H (d d) -> codes whose product with the inputs is near that of w.

    damping  share of the mean diagonal that is added to it | half: what integers stand for is rounded to fp16
    Raises ValueError when H cannot be inverted even so.
    """
    if damping <= 0:
        raise ValueError(f"damping = {damping}; it must be positive, usually 0.01")
    w, H = w.detach().float().clone(), H.float().clone()
    dead = H.diagonal() == 0
    H.diagonal()[dead] = 1
    w[:, dead] = 0
    H.diagonal().add_(damping * H.diagonal().mean())
    try:
        U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    except torch.linalg.LinAlgError:
        raise ValueError(
            f"the inputs of a layer of {len(H)} inputs are too alike to be inverted with damping = {damping}; "
            "raise it (--damping 0.1) or calibrate on more text"
        ) from None
    codes, scales = torch.zeros(w.shape), []
    columns = w.shape[1]
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)
        errors = torch.zeros(len(w), end - start)
        for j in range(start, end):
            if j % group_size == 0:  # corrections from this block reach only to its end, the group may go on
                group = w[:, j : j + group_size].clone()
                if j > start and j + group_size > end:
                    group[:, end - j :] -= errors[:, : j - start] @ U[start:j, end : j + group_size]
                scales.append(group_scales(group, bits, group_size)[:, 0])
            codes[:, j] = to_codes(w[:, j], scales[-1], bits)
            value = codes[:, j] * scales[-1]
            value = value.half().float() if half else value
            errors[:, j - start] = (w[:, j] - value) / U[j, j]
            w[:, j:end] -= errors[:, j - start, None] * U[j, j:end]
        w[:, end:] -= errors @ U[start:end, end:]
    return Codes(codes.to(torch.int8), torch.stack(scales, dim=1), group_size)
