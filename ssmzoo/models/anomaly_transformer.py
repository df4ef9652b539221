"""Anomaly Transformer (Xu et al., ICLR 2022, arXiv 2110.02642): reconstruct windows of a series, and compare where
every point attends with where a Gaussian of learnt width around it would.

    x (b l c) -> convolution and positions -> e_layers x encoder layer (layers/series) -> LayerNorm -> Linear(d -> c)

An anomaly can hardly build associations with the whole series, so its attention resembles the Gaussian of its
neighbours: the discrepancy between both is small where something is wrong (tasks/objectives/association.py).

Source: thuml/Anomaly-Transformer @b0ee470 (MIT), model/AnomalyTransformer.py, attn.py, embed.py; parameter names are
theirs. Not taken over: the LayerNorm of each attention layer, which is never called.
"""

from __future__ import annotations

from torch import Tensor, nn

from ssmzoo.layers.series.association import AnomalyAttention, AnomalyOutput, Association
from ssmzoo.layers.series.encoder import EncoderLayer, SeriesEmbedding, check_window


class Encoder(nn.Module):
    """(b l d) -> (b l d), [Association of every layer]."""

    def __init__(self, layers: list[EncoderLayer], d_model: int):
        super().__init__()
        self.attn_layers, self.norm = nn.ModuleList(layers), nn.LayerNorm(d_model)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Association]]:
        seen = []
        for layer in self.attn_layers:
            x, association = layer(x)
            seen.append(association)
        return self.norm(x), seen


class AnomalyTransformer(nn.Module):
    """windows (b l c) -> AnomalyOutput.

    enc_in       c, channels of the series; standardised outside
    d_model, n_heads, e_layers, d_ff    width, heads, layers, inner width of the feed-forward part
    dropout, activation                 of the feed-forward part and the embedding; gelu or relu
    attention, causal, block_size       see `AnomalyAttention`; published: full, not causal
    """

    def __init__(
        self,
        enc_in: int = 38,
        d_model: int = 512,
        n_heads: int = 8,
        e_layers: int = 3,
        d_ff: int = 512,
        dropout: float = 0.0,
        activation: str = "gelu",
        attention: str = "full",
        causal: bool = False,
        block_size: int = 10,
    ):
        super().__init__()
        self.enc_in = enc_in
        self.embedding = SeriesEmbedding(enc_in, d_model, dropout)
        attentions = (AnomalyAttention(d_model, n_heads, attention, causal, block_size) for _ in range(e_layers))
        self.encoder = Encoder([EncoderLayer(a, d_model, d_ff, dropout, activation) for a in attentions], d_model)
        self.projection = nn.Linear(d_model, enc_in)

    def forward(self, x: Tensor) -> AnomalyOutput:
        check_window(x, self.enc_in)
        y, seen = self.encoder(self.embedding(x))
        return AnomalyOutput(self.projection(y), *zip(*seen))
