"""MAAT: the Anomaly Transformer with a Mamba path and a gate behind every encoder layer.

Mamba Adaptive Anomaly Transformer (Engineering Applications of Artificial Intelligence 160, 2025, 111685).

    x (b l c) -> convolution, positions -> e_layers x [encoder layer, Mamba path, gate] -> LayerNorm -> Linear(d -> c)

    Y = encoder layer(X)                          as in Anomaly Transformer (layers/series)
    K = N(M(Y) + X)                               M a causal Mamba (state 8), N a LayerNorm
    g = sigmoid(W_g [Y ; K]),   X <- g K + (1 - g) Y

M, N and W_g are one instance each, shared by all layers; N is applied once more after the last one.

Paper and released code: the paper's text is block-sparse attention of 10 positions without a causal mask; the released
constructor never switches that on and, by an argument order, leaves the causal mask on. Both are here: attention,
causal; the defaults are what was released. Which of them made the paper's table is not known. The two switches `mamba`
and `gate` are for ablations.

Source: project MAAT @110211f, model/MambaAnomalyTransformer.py, attn.py, embed.py (no licence file: facts only);
parameter names are theirs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ssmzoo.layers.mixers.mamba import Mamba
from ssmzoo.layers.series.association import AnomalyAttention, AnomalyOutput, Association
from ssmzoo.layers.series.encoder import EncoderLayer, SeriesEmbedding, check_window


class MAATEncoder(nn.Module):
    """(b l d) -> (b l d), [Association of every layer]. mamba, gate: see `MAAT`."""

    def __init__(self, layers: list[EncoderLayer], d_model: int, mamba: bool = True, gate: bool = True):
        super().__init__()
        self.attn_layers, self.norm = nn.ModuleList(layers), nn.LayerNorm(d_model)
        self.mamba = Mamba(d_model, d_state=8) if mamba else None
        self.gate = nn.Linear(2 * d_model, d_model) if gate else None

    def forward(self, x: Tensor) -> tuple[Tensor, list[Association]]:
        seen = []
        for layer in self.attn_layers:
            y, association = layer(x)
            k = self.norm((y if self.mamba is None else self.mamba(y)[0]) + x)
            x = k if self.gate is None else self.merge(y, k)
            seen.append(association)
        return self.norm(x), seen

    def merge(self, y: Tensor, k: Tensor) -> Tensor:
        g = torch.sigmoid(self.gate(torch.cat([y, k], dim=-1)))
        return g * k + (1 - g) * y


class MAAT(nn.Module):
    """windows (b l c) -> AnomalyOutput.

    enc_in       c, channels of the series; standardised outside
    d_model, n_heads, e_layers, d_ff    width, heads, layers, inner width of the feed-forward part
    dropout, activation                 of the feed-forward part and the embedding; gelu or relu
    attention, causal, block_size       see `AnomalyAttention`; released: full and causal, in the paper: sparse
    mamba        False: no Mamba on the skip path, K = N(Y + X)
    gate         False: no gate, X <- K
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
        causal: bool = True,
        block_size: int = 10,
        mamba: bool = True,
        gate: bool = True,
    ):
        super().__init__()
        self.enc_in = enc_in
        self.embedding = SeriesEmbedding(enc_in, d_model, dropout)
        attentions = (AnomalyAttention(d_model, n_heads, attention, causal, block_size) for _ in range(e_layers))
        layers = [EncoderLayer(a, d_model, d_ff, dropout, activation) for a in attentions]
        self.encoder = MAATEncoder(layers, d_model, mamba, gate)
        self.projection = nn.Linear(d_model, enc_in)

    def forward(self, x: Tensor) -> AnomalyOutput:
        check_window(x, self.enc_in)
        y, seen = self.encoder(self.embedding(x))
        return AnomalyOutput(self.projection(y), *zip(*seen))
