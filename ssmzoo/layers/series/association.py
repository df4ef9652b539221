"""Anomaly attention: where a point looks (series association) beside where its neighbours would make it look (prior).

    q, k, v = Linear(x) per head                 s = Linear(x), one number per position and head
    sigma = 3^(sigmoid(5 s) + 1e-5) - 1          between 0 and 2 time steps
    P_ij  = exp(-|i - j|^2 / (2 sigma_i^2)) / (sqrt(2 pi) sigma_i)        not normalised: the losses do that
    S     = softmax_j(q_i . k_j / sqrt(E))       over all j, or over j <= i
    S     = softmax_j(q_i . k_j)                 sparse: over j of i's block of c positions, unscaled as released
    y     = Linear(concat_heads S v)

b batch, l window length, d width, h heads, E = d / h.
Source: Xu et al. 2022 (ICLR, Anomaly Transformer) and MAAT (EAAI 160, 2025), by the released code of both; parameter
names are theirs. The released sparse form with a causal mask keeps future positions only; here it keeps the past ones.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

ATTENTIONS = ("full", "sparse")


class Association(NamedTuple):
    """What one layer's attention saw: series and prior (b h l l), sigma (b h l)."""

    series: Tensor
    prior: Tensor
    sigma: Tensor


class AnomalyOutput(NamedTuple):
    """reconstruction (b l c), and series, prior (b h l l) and sigma (b h l) of every layer."""

    reconstruction: Tensor
    series: tuple[Tensor, ...]
    prior: tuple[Tensor, ...]
    sigma: tuple[Tensor, ...]


class AnomalyAttention(nn.Module):
    """(b l d) -> (b l d), Association.

    n_heads      must divide d_model
    attention    "full", or "sparse": within blocks of block_size positions, which must divide the window
    causal       whether a point sees the past only
    """

    def __init__(self, d_model: int, n_heads: int, attention: str = "full", causal: bool = False, block_size: int = 10):
        super().__init__()
        if min(d_model, n_heads, block_size) < 1 or d_model % n_heads:
            fitting = [h for h in range(1, d_model + 1) if d_model % h == 0]
            near = sorted(sorted(fitting, key=lambda h: abs(h - n_heads))[:3])
            raise ValueError(
                f"d_model = {d_model} is not divisible by n_heads = {n_heads} into heads of at least 1 channel "
                f"(block_size = {block_size}); choose one of {near}"
            )
        if attention not in ATTENTIONS:
            raise ValueError(f"attention is {attention!r}; choose one of {', '.join(ATTENTIONS)}")
        self.n_heads, self.attention, self.causal, self.block_size = n_heads, attention, causal, block_size
        self.query_projection = nn.Linear(d_model, d_model)
        self.key_projection = nn.Linear(d_model, d_model)
        self.value_projection = nn.Linear(d_model, d_model)
        self.sigma_projection = nn.Linear(d_model, n_heads)
        self.out_projection = nn.Linear(d_model, d_model)

    def forward(self, x: Tensor) -> tuple[Tensor, Association]:
        projections = (self.query_projection, self.key_projection, self.value_projection)
        q, k, v = (p(x).unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for p in projections)  # (b h l E)
        sigma = widths(self.sigma_projection(x).transpose(1, 2))  # (b h l)
        attend = self.attend_in_blocks if self.attention == "sparse" else self.attend
        y, series = attend(q, k, v)
        y = self.out_projection(y.transpose(1, 2).flatten(2))
        return y, Association(series, gaussian(sigma), sigma)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
        """q, k, v (... l E) -> S v (... l E), S (... l l)."""
        scores = q @ k.transpose(-1, -2) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
        if self.causal:
            future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
            scores = scores.masked_fill(future, float("-inf"))
        series = scores.softmax(-1)
        return series @ v, series

    def attend_in_blocks(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        l, c = q.shape[-2], self.block_size
        if l % c:
            raise ValueError(
                f"sparse attention needs windows of a multiple of block_size = {c}, got {l}; choose a block_size that "
                f"divides {l}, such as {max(n for n in range(1, c + 1) if l % n == 0)}"
            )
        y, series = self.attend(*(t.unflatten(-2, (l // c, c)) for t in (q, k, v)), scale=1.0)  # (b h n c ...)
        series = torch.diag_embed(series.movedim(2, -1), dim1=2, dim2=4)  # (b h n c n c), zero between blocks
        return y.flatten(2, 3), series.flatten(4).flatten(2, 3)


def widths(s: Tensor) -> Tensor:
    """sigma of the projection's output s, in time steps; by expm1, since it comes close to 1e-5."""
    return torch.expm1(math.log(3) * (torch.sigmoid(5 * s) + 1e-5))


def gaussian(sigma: Tensor) -> Tensor:
    """The prior association (b h l l) of widths sigma (b h l); rows do not sum to 1."""
    sigma = sigma.to(torch.promote_types(sigma.dtype, torch.float32)).unsqueeze(-1)
    position = torch.arange(sigma.shape[-2], device=sigma.device, dtype=sigma.dtype)
    distance = position[:, None] - position
    return torch.exp(-distance.square() / (2 * sigma.square())) / (math.sqrt(2 * math.pi) * sigma)
