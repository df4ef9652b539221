"""One graph as a dict of tensors: checked when it is read, a note on unusual ones, batches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

Graph = dict[str, Tensor]


def check_graph(graph: Graph, where: str) -> None:
    """Raise ValueError, naming `where` the graph stands, for tensors that are no graph."""
    x, edge_index, attr = graph["x"], graph["edge_index"], graph.get("edge_attr")
    n = len(x)
    if x.ndim != 2 or n == 0:
        raise ValueError(f"{where}: x has shape {tuple(x.shape)}; expected (nodes, features) with at least one node")
    if edge_index.ndim != 2 or len(edge_index) != 2 or edge_index.is_floating_point():
        raise ValueError(
            f"{where}: edge_index is {edge_index.dtype} {tuple(edge_index.shape)}; expected whole numbers (2, edges), "
            f"(2, 0) without edges"
        )
    if edge_index.numel() and not 0 <= int(edge_index.min()) <= int(edge_index.max()) < n:
        wrong = int(edge_index.max()) if int(edge_index.max()) >= n else int(edge_index.min())
        raise ValueError(f"{where}: edge_index names node {wrong}, but the graph has {n} nodes (0 to {n - 1})")
    if attr is not None and (attr.ndim != 2 or len(attr) != edge_index.shape[1]):
        raise ValueError(f"{where}: edge_attr has shape {tuple(attr.shape)}, but there are {edge_index.shape[1]} edges")
    for name in ("x", "edge_attr"):
        value = graph.get(name)
        if value is not None and value.is_floating_point() and not bool(value.isfinite().all()):
            raise ValueError(f"{where}: {name} holds NaN or infinity; remove the graph or fill them in")


def check_widths(graph: Graph, first: Graph, where: str) -> None:
    """Raise ValueError where a graph's features are not as wide as the first one's."""
    for name, of in (("x", "a node"), ("edge_attr", "an edge")):
        here, there = (g[name].shape[1] if g.get(name) is not None else 0 for g in (graph, first))
        if here != there:
            raise ValueError(
                f"{where}: {name} has {here} features {of}, the first graph has {there}; give all the same"
            )


def check_all(graphs: Sequence[Graph], name: str) -> str | None:
    """Check every graph of a set; a note on unusual ones, which are taken as they are, or None."""
    if not graphs:
        raise ValueError(f"{name} holds no graphs")
    for number, graph in enumerate(graphs):
        check_graph(graph, f"{name}, graph {number}")
        check_widths(graph, graphs[0], f"{name}, graph {number}")
    found = {"isolated nodes": 0, "self-loops": 0, "no edges": 0, "a single node": 0}
    for graph in graphs:
        n, (source, target) = len(graph["x"]), graph["edge_index"]
        other = source != target
        linked = torch.zeros(n, dtype=torch.bool)
        linked[source[other]] = linked[target[other]] = True
        found["no edges"] += source.numel() == 0
        found["a single node"] += n == 1
        found["self-loops"] += bool((~other).any())
        found["isolated nodes"] += n > 1 and source.numel() > 0 and not bool(linked.all())
    words = [f"{count} with {what}" for what, count in found.items() if count]
    return f"{name}: of {len(graphs)} graphs {', '.join(words)}; they are kept" if words else None


def collate(graphs: Iterable[Graph]) -> dict[str, Any]:
    """Disjoint union: nodes and edges one graph after the other, `batch` (v) the graph of every node, `num_graphs`."""
    graphs = list(graphs)
    sizes = torch.tensor([len(g["x"]) for g in graphs])
    offsets = (sizes.cumsum(0) - sizes).tolist()
    batch: dict[str, Any] = {}
    for name in graphs[0]:
        values = [g[name] for g in graphs]
        if name in ("edge_index", "edge_label_index"):
            batch[name] = torch.cat([value + offset for value, offset in zip(values, offsets)], dim=1)
        else:
            batch[name] = torch.cat(values)
    batch["batch"] = torch.repeat_interleave(torch.arange(len(graphs)), sizes)
    return batch | {"num_graphs": len(graphs)}


def undirected(pairs: np.ndarray) -> np.ndarray:
    """(m 2) pairs -> (2 2m) edges in both directions."""
    return np.concatenate([pairs, pairs[:, ::-1]]).T.copy()
