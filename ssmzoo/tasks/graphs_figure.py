"""A sheet of validation graphs with what the model says of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssmzoo.terminal import caption

LARGEST = 400  # nodes of a graph that is drawn


@torch.no_grad()
def draw_graphs(model: nn.Module, data, png: Path, device, rows: int = 2, columns: int = 6) -> Path:
    """Graphs of the first validation batch; nodes are coloured by their first feature, or by the sum of all where the
    data has no place for them."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    was_training = model.training
    batch = next(iter(data.val_dataloader()))
    logits = model.eval()({k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}).logits.cpu()
    model.train(was_training)
    figure, axes = plt.subplots(rows, columns, figsize=(2 * columns, 2.2 * rows), constrained_layout=True)
    for axis in axes.flat:
        axis.axis("off")
    sizes = torch.bincount(batch["batch"], minlength=batch["num_graphs"])
    drawn = [g for g in range(batch["num_graphs"]) if sizes[g] <= LARGEST][: rows * columns]
    for axis, number in zip(axes.flat, drawn):
        graph, nodes = cut(batch, number)
        places, colour = data.position(graph), graph["x"][:, 0]
        if places is None:
            places, colour = spread(graph), graph["x"].float().sum(1)
        source, target = graph["edge_index"]
        axis.plot(*places[torch.stack([source, target])].permute(2, 0, 1).numpy(), color="0.8", lw=0.6, zorder=0)
        words, right = said(model.level, logits, batch["y"], number, nodes)
        axis.scatter(*places.T.numpy(), c=colour.float().numpy(), s=14, cmap="viridis", zorder=1)
        axis.set_title(caption(words), fontsize=8, color="black" if right else "#D55E00")
    figure.suptitle("validation graphs and what the model says (wrong in red)", fontsize=10)
    figure.savefig(png, dpi=120)
    plt.close(figure)
    return png


def cut(batch: dict[str, Any], number: int) -> tuple[dict[str, Tensor], Tensor]:
    """(graph `number` of a batch, which of the batch's nodes it has (v))"""
    nodes = batch["batch"] == number
    first, mine = int(nodes.nonzero()[0]), nodes[batch["edge_index"][0]]
    return {"x": batch["x"][nodes], "edge_index": batch["edge_index"][:, mine] - first}, nodes


def spread(graph: dict[str, Tensor]) -> Tensor:
    """(n 2) by distances along the edges, of large graphs by springs."""
    import networkx as nx
    import numpy as np

    found = nx.Graph()
    found.add_nodes_from(range(len(graph["x"])))
    found.add_edges_from(graph["edge_index"].T.tolist())
    try:
        places = nx.kamada_kawai_layout(found) if len(found) <= 60 else nx.spring_layout(found, seed=0)
    except ImportError:  # the former needs scipy
        places = nx.circular_layout(found)
    return torch.from_numpy(np.array([places[i] for i in range(len(places))]))


def said(level: str, logits: Tensor, y: Tensor, number: int, nodes: Tensor) -> tuple[str, bool]:
    """(words, whether they are right) of one graph."""
    if level == "edge":
        return "", True
    if y.is_floating_point():
        rows = (logits, y) if level == "graph" else (logits[nodes], y[nodes])
        got, wanted = (r[number if level == "graph" else slice(None)].float().mean().item() for r in rows)
        return f"{got:.2f} (is {wanted:.2f})", True
    predicted = logits.argmax(-1)
    if level == "graph":
        right = bool(predicted[number] == y[number])
        return f"{predicted[number]}" if right else f"{predicted[number]}, is {y[number]}", right
    asked = nodes & (y >= 0)
    hits, count = int((predicted[asked] == y[asked]).sum()), int(asked.sum())
    if count == 1:
        got, wanted = int(predicted[asked]), int(y[asked])
        return f"{got}" if got == wanted else f"{got}, is {wanted}", got == wanted
    return f"{hits} of {count} nodes right", hits == count
