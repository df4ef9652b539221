"""The GPS layer: local message passing and a global model beside each other, then a feed-forward."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ssmzoo.layers.graph.batch import Graphs
from ssmzoo.layers.graph.local import norm_rows


class GPSLayer(nn.Module):
    """u = BN(local(h, e)) + BN(h + dropout(global(h)));   out = BN(u + FF(u)),  FF two layers with ReLU, 2d wide

    Both branches read the layer's input. BN is BatchNorm over all nodes of the batch.

    local_model   Graphs -> (nodes (v d) with its residual, edges (m d)); None: no message passing
    self_attn     (nodes (v d), Graphs, **more) -> (v d); None: message passing alone

    Source: Rampasek et al. 2022 (arXiv 2205.12454), equations 2 to 6; parameter names of GraphGPS.
    """

    def __init__(self, d_model: int, local_model: nn.Module | None, self_attn: nn.Module | None, dropout: float = 0.0):
        super().__init__()
        if local_model is None and self_attn is None:
            raise ValueError("a GPS layer needs a local model, a global model or both")
        self.local_model, self.self_attn, self.dropout = local_model, self_attn, dropout
        self.norm1_local = nn.BatchNorm1d(d_model) if local_model is not None else None
        self.norm1_attn = nn.BatchNorm1d(d_model) if self_attn is not None else None
        self.ff_linear1, self.ff_linear2 = nn.Linear(d_model, 2 * d_model), nn.Linear(2 * d_model, d_model)
        self.norm2 = nn.BatchNorm1d(d_model)

    def forward(self, graphs: Graphs, **more) -> Graphs:
        """-> the same graphs with new x and edge_attr; `more` goes to the global model."""
        h, e, u = graphs.x, graphs.edge_attr, 0.0
        if self.local_model is not None:
            local, e = self.local_model(graphs)
            u = norm_rows(self.norm1_local, local)
        if self.self_attn is not None:
            u = u + norm_rows(self.norm1_attn, h + self._drop(self.self_attn(h, graphs, **more)))
        inner = self._drop(F.relu(self.ff_linear1(u)))
        return graphs._replace(x=norm_rows(self.norm2, u + self._drop(self.ff_linear2(inner))), edge_attr=e)

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)
