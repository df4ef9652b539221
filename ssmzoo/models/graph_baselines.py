"""GPS and GatedGCN: message passing beside full attention within every graph, and alone.

    GatedGCN   h, e <- GatedGCN(h, e), a residual inside (Bresson & Laurent 2017, arXiv 1711.07553)
    GPS        u = BN(GatedGCN(h, e)) + BN(h + attention(h)),   h <- BN(u + FF(u))   (Rampasek et al. 2022, 2205.12454)

Source: rampasek/GraphGPS (MIT), graphgps/layer/gps_layer.py and gatedgcn_layer.py; names of their parameters but for
the attention, whose projections are linear maps here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmzoo.layers.graph.batch import Graphs
from ssmzoo.layers.graph.gps import GPSLayer
from ssmzoo.layers.graph.local import local_model as make_local
from ssmzoo.layers.graph.model import GraphModel


class NodeAttention(nn.Module):
    """Softmax attention among the nodes of every graph. (v d) -> (v d); padded to the largest."""

    def __init__(self, d_model: int, num_heads: int = 4, dropout: float = 0.0):
        super().__init__()
        if d_model % num_heads:
            raise ValueError(f"num_heads = {num_heads} does not divide d_model = {d_model}")
        self.num_heads, self.dropout = num_heads, dropout
        self.in_proj, self.out_proj = nn.Linear(d_model, 3 * d_model), nn.Linear(d_model, d_model)

    def forward(self, h: Tensor, graphs: Graphs) -> Tensor:
        number, sizes = graphs.index_in_graph(), graphs.sizes()
        longest = int(sizes.max())
        place = graphs.batch * longest + number
        qkv = self.in_proj(h)
        dense = qkv.new_zeros(graphs.num_graphs * longest, qkv.shape[1]).index_copy(0, place, qkv)
        q, k, v = dense.view(graphs.num_graphs, longest, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # (g h n p)
        real = torch.arange(longest, device=h.device) < sizes[:, None]  # (g n)
        mask = None if bool(real.all()) else real[:, None, None]
        y = F.scaled_dot_product_attention(q, k, v, mask, self.dropout if self.training else 0.0)
        return self.out_proj(y.transpose(1, 2).flatten(2).flatten(0, 1).index_select(0, place))


class GPS(GraphModel):
    """GPS with attention: a batch of graphs -> GraphOutput(logits, x).

    d_model, n_layer          width, number of layers;  num_heads, attn_dropout  of the attention
    all others as in GraphMamba
    """

    def __init__(
        self,
        num_classes: int = 10,
        node_dim: int = 3,
        edge_dim: int = 1,
        d_model: int = 96,
        n_layer: int = 4,
        level: str = "graph",
        local_model: str = "gated_gcn",
        num_heads: int = 4,
        attn_dropout: float = 0.0,
        lap_pe: Mapping[str, Any] | None = None,
        rwse: Mapping[str, Any] | None = None,
        node_vocab: Sequence[int] | None = None,
        edge_vocab: Sequence[int] | None = None,
        pool: str = "mean",
        head_layers: int = 2,
        dropout: float = 0.0,
    ):
        def layer() -> GPSLayer:
            local = None if local_model == "none" else make_local(local_model, d_model, dropout)
            return GPSLayer(d_model, local, NodeAttention(d_model, num_heads, attn_dropout), dropout)

        super().__init__(
            *((layer() for _ in range(n_layer)), d_model, num_classes, node_dim, edge_dim, level, pool, head_layers),
            *(node_vocab, edge_vocab, lap_pe, rwse),
        )


class Local(nn.Module):
    """A local model as a layer of its own: Graphs -> Graphs."""

    def __init__(self, local_model: nn.Module):
        super().__init__()
        self.local_model = local_model

    def forward(self, graphs: Graphs) -> Graphs:
        x, edge_attr = self.local_model(graphs)
        return graphs._replace(x=x, edge_attr=edge_attr)


class GatedGCNModel(GraphModel):
    """Message passing alone: what lies n_layer edges away and further cannot be known. d_model is the width; arguments
    as in GraphMamba."""

    def __init__(
        self,
        num_classes: int = 10,
        node_dim: int = 3,
        edge_dim: int = 1,
        d_model: int = 96,
        n_layer: int = 4,
        level: str = "graph",
        local_model: str = "gated_gcn",
        lap_pe: Mapping[str, Any] | None = None,
        rwse: Mapping[str, Any] | None = None,
        node_vocab: Sequence[int] | None = None,
        edge_vocab: Sequence[int] | None = None,
        pool: str = "mean",
        head_layers: int = 2,
        dropout: float = 0.0,
    ):
        layers = (Local(make_local(local_model, d_model, dropout)) for _ in range(n_layer))
        super().__init__(
            *(layers, d_model, num_classes, node_dim, edge_dim, level, pool, head_layers),
            *(node_vocab, edge_vocab, lap_pe, rwse),
        )
