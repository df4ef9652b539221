"""Graph-Mamba (Wang et al. 2024, arXiv 2402.00789): message passing beside a selective scan over ordered nodes.

    h_L = BN(GatedGCN(h, e)),   h_G = BN(h + scan(h)),   u = h_L + h_G,   h <- BN(u + FF(u))

What differs from a GPS transformer: global attention is a Mamba mixer (width d, no expansion) over the nodes of each
graph in an order in which important nodes (many edges) come last and have seen all others. Equal degrees are shuffled:
anew in every layer and step of training, and five times in evaluation, where the outputs are averaged in every layer.

What differs from the released code: all graphs of a batch are documents of one sequence, without padding to the largest
one; the draws of evaluation are seeded per node, so that a prediction depends neither on the batch nor on the moment;
training is `module.training`, not an attribute of the batch.

Source: bowang-lab/Graph-Mamba @acb4a23, graphgps/layer/gps_layer.py; parameter names of its layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ssmzoo.layers.graph.gps import GPSLayer
from ssmzoo.layers.graph.local import local_model as make_local
from ssmzoo.layers.graph.model import GraphModel
from ssmzoo.models.graph_mamba_layers.scan import NodeScan
from ssmzoo.suggest import from_slot


class GraphMamba(GraphModel):
    """A batch of graphs (named tensors, or PyTorch Geometric's Batch) -> GraphOutput(logits, x).

    num_classes    outputs;  node_dim, edge_dim  features of a node and of an edge (0: edges have none)
    d_model, n_layer, dropout
    level          what is asked for: graph | node | edge;  pool, head_layers  see GraphModel
    local_model    gated_gcn | gine | gen | gat | pna (the last three of PyTorch Geometric) | none
    order          stored | random | degree | degree_noise | eigen | random_walk | cluster, see `graph_mamba_layers`
    buckets        sequences that the nodes of a graph are dealt to (published: 3 for large graphs)
    average        orders that evaluation averages over
    mixer          arguments of the Mamba mixer: d_state, d_conv, expand, ...
    node_vocab, edge_vocab   sizes of integer features;  lap_pe, rwse  encodings of position, by their arguments
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
        order: str = "degree_noise",
        buckets: int = 1,
        average: int = 5,
        mixer: Mapping[str, Any] | None = None,
        lap_pe: Mapping[str, Any] | None = None,
        rwse: Mapping[str, Any] | None = None,
        node_vocab: Sequence[int] | None = None,
        edge_vocab: Sequence[int] | None = None,
        pool: str = "mean",
        head_layers: int = 2,
        dropout: float = 0.0,
    ):
        def layer(number: int) -> GPSLayer:
            own = {"order": order, "buckets": buckets, "average": average, "seed": number}
            scan = from_slot("mixer", mixer, NodeScan, d_model, **own)
            local = None if local_model == "none" else make_local(local_model, d_model, dropout)
            return GPSLayer(d_model, local, scan, dropout)

        layers = (layer(number) for number in range(n_layer))
        super().__init__(
            *(layers, d_model, num_classes, node_dim, edge_dim, level, pool, head_layers),
            *(node_vocab, edge_vocab, lap_pe, rwse),
        )
