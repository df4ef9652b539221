"""Windows of a series into the width of a model, and the post-norm layer of Anomaly Transformer and MAAT.

    embedding   conv1d over time, kernel 3, circular, no bias, plus a fixed table of sines and cosines
    layer       a = LN1(x + drop(attention(x)));   y = LN2(a + drop(W_2 drop(act(W_1 a))))

Source: Xu et al. 2022 (ICLR), by the released code; parameter names are theirs (W_1 and W_2 are convolutions of one
tap). The LayerNorm that every attention layer owns there and never calls is left out (released/maat.py).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssmzoo.layers.series.association import AnomalyAttention, Association

ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu}
POSITIONS = 5000


class TokenEmbedding(nn.Module):
    """(b l c) -> (b l d)."""

    def __init__(self, c_in: int, d_model: int):
        super().__init__()
        self.tokenConv = nn.Conv1d(c_in, d_model, 3, padding=1, padding_mode="circular", bias=False)
        nn.init.kaiming_normal_(self.tokenConv.weight, a=0.01, mode="fan_in", nonlinearity="leaky_relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.tokenConv(x.mT).mT


class PositionTable(nn.Module):
    """sin on even channels, cos on odd ones, wavelengths from 2 pi to 10000 * 2 pi steps: (1 l d)."""

    def __init__(self, d_model: int):
        super().__init__()
        rate = torch.exp(torch.arange(0, d_model, 2, dtype=torch.float64) * (-math.log(10000.0) / d_model))
        angle = torch.arange(POSITIONS, dtype=torch.float64)[:, None] * rate
        pe = torch.stack([angle.sin(), angle.cos()], -1).flatten(1)[:, :d_model].to(torch.get_default_dtype())
        self.register_buffer("pe", pe[None])

    def forward(self, length: int) -> Tensor:
        if length > POSITIONS:
            raise ValueError(f"a window of {length} points is longer than the {POSITIONS} positions of the table")
        return self.pe[:, :length]


class SeriesEmbedding(nn.Module):
    """(b l c) -> (b l d)."""

    def __init__(self, c_in: int, d_model: int, dropout: float = 0.0):
        super().__init__()
        self.value_embedding, self.position_embedding = TokenEmbedding(c_in, d_model), PositionTable(d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.value_embedding(x) + self.position_embedding(x.shape[1]))


class EncoderLayer(nn.Module):
    """(b l d) -> (b l d), Association; d_ff is the inner width, activation gelu or relu."""

    def __init__(self, attention: AnomalyAttention, d_model: int, d_ff: int, dropout: float, activation: str):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation is {activation!r}; choose one of {', '.join(ACTIVATIONS)}")
        self.attention, self.activation = attention, ACTIVATIONS[activation]
        self.conv1, self.conv2 = nn.Conv1d(d_model, d_ff, 1), nn.Conv1d(d_ff, d_model, 1)
        self.norm1, self.norm2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> tuple[Tensor, Association]:
        y, association = self.attention(x)
        a = self.norm1(x + self.dropout(y))
        inner = self.dropout(self.activation(self.conv1(a.mT)))
        return self.norm2(a + self.dropout(self.conv2(inner).mT)), association


def check_window(x: Tensor, channels: int) -> None:
    """ValueError unless x is (b l channels)."""
    if x.ndim != 3 or x.shape[-1] != channels:
        raise ValueError(f"expected windows of shape (batch, length, {channels} channels), got {tuple(x.shape)}")
