"""Local message passing: GatedGCN and GINE written out, and three of PyTorch Geometric's where it is installed.

A local model maps a batch of graphs to (nodes (v d), edges (m d)), its residual inside.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmzoo.layers.graph.batch import Graphs
from ssmzoo.suggest import nearest

LOCAL = ("gated_gcn", "gine", "gen", "gat", "pna")


class GatedGCN(nn.Module):
    """Message passing in which every edge carries a gate per channel.

        e_ij = D h_i + E h_j + C e_ij_in,   s_ij = sigmoid(e_ij)
        h_i' = A h_i + sum_j s_ij * B h_j / (sum_j s_ij + 1e-6)
        h <- h + dropout(ReLU(BN(h'))),   e <- e + dropout(ReLU(BN(e_ij)))

    i is an edge's target, j its source. Source: Bresson & Laurent 2017 (arXiv 1711.07553); names of GraphGPS.
    """

    def __init__(self, d_model: int, dropout: float = 0.0):
        super().__init__()
        self.A, self.B, self.C, self.D, self.E = (nn.Linear(d_model, d_model) for _ in range(5))
        self.bn_node_x, self.bn_edge_e = nn.BatchNorm1d(d_model), nn.BatchNorm1d(d_model)
        self.dropout = dropout

    def forward(self, graphs: Graphs) -> tuple[Tensor, Tensor]:
        h, e = graphs.x, graphs.edge_attr
        source, target = graphs.edge_index
        edges = self.D(h).index_select(0, target) + self.E(h).index_select(0, source) + self.C(e)  # (m d)
        gates = edges.sigmoid()
        heard = graphs.sum_at_targets(gates * self.B(h).index_select(0, source))
        nodes = self.A(h) + heard / (graphs.sum_at_targets(gates) + 1e-6)
        return h + self._after(self.bn_node_x, nodes), e + self._after(self.bn_edge_e, edges)

    def _after(self, norm: nn.Module, x: Tensor) -> Tensor:
        return F.dropout(F.relu(norm_rows(norm, x)), self.dropout, self.training)


class GINE(nn.Module):
    """h <- h + dropout(MLP((1 + eps) h_i + sum_j ReLU(h_j + e_ij))), eps = 0 and not learned; edges stay as they are.

    Source: Hu et al. 2020 (arXiv 1905.12265), GINEConv of PyTorch Geometric, whose names these are.
    """

    def __init__(self, d_model: int, dropout: float = 0.0):
        super().__init__()
        self.nn = nn.Sequential(nn.Linear(d_model, d_model), nn.ReLU(), nn.Linear(d_model, d_model))
        self.register_buffer("eps", torch.zeros(1))
        self.dropout = dropout

    def forward(self, graphs: Graphs) -> tuple[Tensor, Tensor]:
        messages = F.relu(graphs.x.index_select(0, graphs.edge_index[0]) + graphs.edge_attr)
        h = self.nn((1 + self.eps) * graphs.x + graphs.sum_at_targets(messages))
        return graphs.x + F.dropout(h, self.dropout, self.training), graphs.edge_attr


class FromPyG(nn.Module):
    """A convolution of PyTorch Geometric with its defaults, a dropout and a residual around it."""

    def __init__(self, conv: nn.Module, dropout: float = 0.0):
        super().__init__()
        self.conv, self.dropout = conv, dropout

    def forward(self, graphs: Graphs) -> tuple[Tensor, Tensor]:
        h = self.conv(graphs.x, graphs.edge_index, graphs.edge_attr)
        return graphs.x + F.dropout(h, self.dropout, self.training), graphs.edge_attr


def local_model(name: str, d_model: int, dropout: float = 0.0, num_heads: int = 4) -> nn.Module:
    """gated_gcn | gine, or gen | gat | pna of PyTorch Geometric. Raises ValueError for other names, or without it."""
    if name == "gated_gcn":
        return GatedGCN(d_model, dropout)
    if name == "gine":
        return GINE(d_model, dropout)
    if name not in LOCAL:
        raise ValueError(f"local_model is {name!r}{nearest(str(name), LOCAL)}; choose one of {', '.join(LOCAL)}")
    try:
        from torch_geometric import nn as pyg
    except ImportError:
        raise ValueError(
            f"local_model={name} needs PyTorch Geometric: pip install torch_geometric; gated_gcn and gine do not"
        ) from None
    if name == "gen":
        return FromPyG(pyg.GENConv(d_model, d_model), dropout)
    if name == "gat":
        if d_model % num_heads:
            raise ValueError(f"local_model=gat has {num_heads} heads, which do not divide d_model = {d_model}")
        return FromPyG(pyg.GATConv(d_model, d_model // num_heads, heads=num_heads, edge_dim=d_model), dropout)
    aggregators, ones = ["mean", "max", "sum"], torch.ones(2, dtype=torch.long)  # degrees, which "identity" ignores
    return FromPyG(pyg.PNAConv(d_model, d_model, aggregators, ["identity"], ones, edge_dim=d_model), dropout)


def norm_rows(norm: nn.Module, x: Tensor) -> Tensor:
    """BatchNorm over rows; none or a single one in training, which have no variance, take the running statistics."""
    if norm.training and len(x) < 2:
        return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)
    return norm(x)
