"""The skeleton of a graph model: encoders, GPS layers, head."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from ssmzoo.layers.graph.batch import Graphs, pool
from ssmzoo.layers.graph.encoders import RWSE, EdgeEncoder, LapPE, NodeEncoder
from ssmzoo.layers.graph.gps import GPSLayer
from ssmzoo.suggest import from_slot

LEVELS, POOLS = ("graph", "node", "edge"), ("mean", "max", "sum")


class GraphOutput(NamedTuple):
    """logits (g c) of graphs, (v c) of nodes or (q) of pairs of nodes
    x (v d) nodes after the last layer; where pairs are asked for after the head: a score is their product"""

    logits: Tensor
    x: Tensor


class GraphModel(nn.Module):
    """A batch of graphs (named tensors, or PyTorch Geometric's Batch) -> GraphOutput.

    layers       GPS layers;  num_classes  outputs c
    node_dim, edge_dim      features of a node and of an edge (0: one learnt vector for all edges)
    level        what is asked for: graph | node | edge (a score for every pair of edge_label_index)
    pool         of nodes into a graph: mean | max | sum;  head_layers  of the MLP behind it
    node_vocab, edge_vocab  sizes of integer features, column by column, which are embedded
    lap_pe, rwse arguments of LapPE and RWSE, whose encodings are put beside the nodes' features; None: without
    """

    def __init__(
        self,
        layers: Iterable[GPSLayer],
        d_model: int,
        num_classes: int,
        node_dim: int,
        edge_dim: int,
        level: str = "graph",
        pool: str = "mean",
        head_layers: int = 2,
        node_vocab: Sequence[int] | None = None,
        edge_vocab: Sequence[int] | None = None,
        lap_pe: Mapping[str, Any] | None = None,
        rwse: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        for name, value, choices in (("level", level, LEVELS), ("pool", pool, POOLS)):
            if value not in choices:
                raise ValueError(f"{name} is {value!r}; choose one of {', '.join(choices)}")
        self.level, self.pool, self.num_classes, self.d_model = level, pool, num_classes, d_model
        lap = None if lap_pe is None else from_slot("lap_pe", lap_pe, LapPE)
        walks = None if rwse is None else from_slot("rwse", rwse, RWSE)
        self.node_encoder = NodeEncoder(node_dim, d_model, node_vocab, lap, walks)
        self.edge_encoder = EdgeEncoder(edge_dim, d_model, edge_vocab)
        self.layers = nn.ModuleList(layers)
        out = d_model if level == "edge" else num_classes
        hidden = [m for _ in range(head_layers - 1) for m in (nn.Linear(d_model, d_model), nn.ReLU())]
        self.head = nn.Sequential(*hidden, nn.Linear(d_model, out))

    def forward(self, graphs: Any) -> GraphOutput:
        graphs = self.encode(Graphs.of(graphs))
        for layer in self.layers:
            graphs = layer(graphs)
        if self.level == "edge":
            return self.score_pairs(graphs)
        nodes = graphs.x if self.level == "node" else pool(graphs.x, graphs, self.pool)
        return GraphOutput(self.head(nodes), graphs.x)

    def encode(self, graphs: Graphs) -> Graphs:
        """x and edge_attr become (v d) and (m d)."""
        return graphs._replace(x=self.node_encoder(graphs), edge_attr=self.edge_encoder(graphs))

    def score_pairs(self, graphs: Graphs) -> GraphOutput:
        if graphs.edge_label_index is None:
            raise ValueError("level=edge needs edge_label_index, the pairs of nodes that are asked for")
        nodes = self.head(graphs.x)
        a, b = graphs.edge_label_index
        return GraphOutput((nodes[a] * nodes[b]).sum(-1), nodes)
