"""A batch of graphs as named tensors, in PyTorch Geometric's names, and what is wrong with one in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

NODE_FIELDS = ("EigVecs", "EigVals", "pestat_RWSE", "EigCentrality", "LouvainCluster")


class Graphs(NamedTuple):
    """The disjoint union of g graphs.

    x           (v f) float features, or (v c) integers of c categories
    edge_index  (2 m) int64, source and target of every edge
    edge_attr   (m k) float or integers; None: edges without features
    batch       (v) int64, ascending: the graph of every node
    num_graphs  g
    EigVecs (v q), EigVals (v q 1)   of the Laplacian, NaN where a graph has fewer than q nodes
    pestat_RWSE (v s)                probabilities of being back after 1 .. s random steps
    EigCentrality (v), LouvainCluster (v)    for orders of the scan
    edge_label_index (2 q)           pairs of nodes that are asked for, in tasks on edges
    """

    x: Tensor
    edge_index: Tensor
    edge_attr: Tensor | None
    batch: Tensor
    num_graphs: int
    EigVecs: Tensor | None = None
    EigVals: Tensor | None = None
    pestat_RWSE: Tensor | None = None
    EigCentrality: Tensor | None = None
    LouvainCluster: Tensor | None = None
    edge_label_index: Tensor | None = None

    @classmethod
    def of(cls, given: Any) -> Graphs:
        """From named tensors or a Data or Batch of PyTorch Geometric; without `batch` it is one graph.

        Raises ValueError, naming the tensor, for what is no batch of graphs.
        """
        if isinstance(given, Graphs):
            return given
        names = given.keys() if callable(getattr(given, "keys", None)) else ()
        tensors = {name: given[name] for name in names if name in cls._fields}
        for name in ("x", "edge_index"):
            if not isinstance(tensors.get(name), Tensor):
                found = ", ".join(map(str, names)) or type(given).__name__
                raise ValueError(f"a batch of graphs needs the tensors x and edge_index, got {found}")
        x = tensors["x"] if tensors["x"].ndim != 1 else tensors["x"][:, None]
        edge_index, batch = tensors["edge_index"].long(), tensors.get("batch")
        batch = x.new_zeros(len(x), dtype=torch.long) if batch is None else batch.long()
        attr = tensors.get("edge_attr")
        attr = attr[:, None] if attr is not None and attr.ndim == 1 else attr
        known = getattr(given, "num_graphs", None) if not isinstance(given, Mapping) else given.get("num_graphs")
        num_graphs = int(known) if known is not None else int(batch[-1]) + 1 if len(batch) else 0
        own = {"x": x, "edge_index": edge_index, "edge_attr": attr, "batch": batch, "num_graphs": num_graphs}
        graphs = cls(**(tensors | own))
        check(graphs)
        return graphs

    def degree(self) -> Tensor:
        """(v) int64: edges that leave a node (row 0 of edge_index)."""
        return torch.bincount(self.edge_index[0], minlength=len(self.x))

    def sizes(self) -> Tensor:
        """(g) nodes of every graph."""
        return torch.bincount(self.batch, minlength=self.num_graphs)

    def index_in_graph(self) -> Tensor:
        """(v) number of every node within its graph."""
        sizes = self.sizes()
        return torch.arange(len(self.batch), device=self.batch.device) - (sizes.cumsum(0) - sizes)[self.batch]

    def per_edge(self, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """(v d) -> (m d) at the sources, (m d) at the targets."""
        return nodes.index_select(0, self.edge_index[0]), nodes.index_select(0, self.edge_index[1])

    def sum_at_targets(self, messages: Tensor) -> Tensor:
        """(m d) -> (v d)"""
        return sum_by(messages, self.edge_index[1], len(self.x))


def sum_by(values: Tensor, index: Tensor, size: int) -> Tensor:
    """values (m d) summed by index (m) -> (size d)"""
    return values.new_zeros(size, values.shape[1]).scatter_add(0, index[:, None].expand_as(values), values)


def pool(nodes: Tensor, graphs: Graphs, how: str) -> Tensor:
    """(v d) -> (g d): mean, sum or maximum of every graph's nodes."""
    if how == "max":
        index = graphs.batch[:, None].expand_as(nodes)
        return nodes.new_zeros(graphs.num_graphs, nodes.shape[1]).scatter_reduce(
            0, index, nodes, "amax", include_self=False
        )
    total = sum_by(nodes, graphs.batch, graphs.num_graphs)
    return total if how == "sum" else total / graphs.sizes().clamp(min=1)[:, None]


def check(graphs: Graphs) -> None:
    """Raise ValueError for tensors that do not belong together, naming the one that is wrong."""
    v, m = len(graphs.x), graphs.edge_index.shape[-1]
    if graphs.x.ndim != 2 or v == 0:
        raise ValueError(f"x has shape {tuple(graphs.x.shape)}; expected (nodes, features) with at least one node")
    if graphs.edge_index.ndim != 2 or len(graphs.edge_index) != 2:
        raise ValueError(
            f"edge_index has shape {tuple(graphs.edge_index.shape)}; expected (2, edges): sources and targets "
            f"(a graph without edges has shape (2, 0))"
        )
    if graphs.batch.shape != (v,):
        raise ValueError(f"batch has shape {tuple(graphs.batch.shape)}; expected ({v},), the graph of every node")
    if graphs.edge_attr is not None and (graphs.edge_attr.ndim != 2 or len(graphs.edge_attr) != m):
        raise ValueError(f"edge_attr has shape {tuple(graphs.edge_attr.shape)}; edge_index has {m} edges")
    for name in NODE_FIELDS:
        value = getattr(graphs, name)
        if value is not None and len(value) != v:
            raise ValueError(f"{name} has {len(value)} rows; there are {v} nodes")
    for name in ("edge_index", "edge_label_index"):
        value = getattr(graphs, name)
        if value is not None and value.numel() and (int(value.min()) < 0 or int(value.max()) >= v):
            wrong = int(value.max()) if int(value.max()) >= v else int(value.min())
            raise ValueError(f"{name} names node {wrong}, but there are {v} nodes (0 to {v - 1})")
    if bool((graphs.batch[1:] < graphs.batch[:-1]).any()) or not 0 <= int(graphs.batch[0]):
        raise ValueError("batch must ascend from 0: the nodes of a graph stand together")
    if int(graphs.batch[-1]) >= graphs.num_graphs:
        raise ValueError(f"batch names graph {int(graphs.batch[-1])}, but num_graphs is {graphs.num_graphs}")
