"""A Mamba mixer over the nodes of every graph of a batch, as documents of one packed sequence."""

from __future__ import annotations

from torch import Tensor

from ssmzoo.layers.graph.batch import Graphs
from ssmzoo.layers.mixers.mamba import Mamba
from ssmzoo.models.graph_mamba_layers.order import DRAWN, ORDERS, Draws, draw, scan_order
from ssmzoo.suggest import nearest


class NodeScan(Mamba):
    """Nodes (v d) of a batch of graphs -> (v d): all graphs one after the other, the state set to zero in between.

    order     see `order.py`
    buckets   > 1: every node goes to one of so many sequences at random, each scanned on its own
    average   orders that evaluation averages the outputs of (where orders are drawn); training takes one
    seed      of evaluation's draws, which are functions of a node's number in its graph
    mixer     arguments of Mamba, by name

    Source: Wang et al. 2024 (arXiv 2402.00789), section 4.
    """

    def __init__(
        self,
        d_model: int,
        order: str = "degree_noise",
        buckets: int = 1,
        average: int = 5,
        seed: int = 0,
        **mixer,
    ):
        super().__init__(d_model, **({"expand": 1} | mixer))
        if order not in ORDERS:
            raise ValueError(f"order is {order!r}{nearest(str(order), ORDERS)}; choose one of {', '.join(ORDERS)}")
        if min(buckets, average) < 1:
            raise ValueError(f"buckets = {buckets} and average = {average} must be at least 1")
        self.order, self.buckets, self.average, self.seed = order, buckets, average, seed

    def forward(self, h: Tensor, graphs: Graphs, draws: Draws | None = None) -> Tensor:
        if draws is None:
            drawn = self.order in DRAWN or self.buckets > 1
            count = self.average if drawn and not self.training else 1
            draws = draw(graphs, count, self.buckets, None if self.training else self.seed)
        places, sequence = scan_order(self.order, graphs, draws, self.training)
        y, _ = super().forward(h[places], seq_idx=sequence)  # (k v d)
        back = places.argsort(dim=1)[..., None].expand_as(y)
        return y.gather(1, back).mean(0)
