"""What simple models reach on a set of graphs: constants, and linear models of pooled features that see no edge."""

from __future__ import annotations

import numpy as np
import torch

from ssmzoo.data.graphs.sample import Graph
from ssmzoo.data.graphs.sources import Source

IGNORE = -100


def pooled(graph: Graph) -> np.ndarray:
    """Mean, deviation, minimum and maximum of every feature of the nodes, and the numbers of nodes and edges."""
    x = graph["x"].double()
    spread = x.std(0, unbiased=False)
    parts = (x.mean(0), spread, x.amin(0), x.amax(0), torch.tensor([len(x), graph["edge_index"].shape[1]]).double())
    return torch.cat(parts).numpy()


def of_source(source: Source) -> dict[str, float]:
    """{what it is: value in the set's metric} for graphs and nodes with classes or values; {} where none applies."""
    y, y_val = (torch.cat([g["y"] for g in side]) for side in (source.train, source.val))
    if source.metric == "mae":
        return {"the median of the training graphs": (y_val - y.median(0).values).abs().mean().item()}
    if source.metric != "accuracy":
        return {}
    y, y_val = y[y != IGNORE], y_val[y_val != IGNORE]
    found = {"the most frequent class": (y_val == y.mode().values).float().mean().item()}
    if source.level == "graph":
        try:
            from sklearn.linear_model import LogisticRegression
            from sklearn.pipeline import make_pipeline
            from sklearn.preprocessing import StandardScaler
        except ImportError:
            return found
        x, x_val = (np.stack([pooled(g) for g in side]) for side in (source.train, source.val))
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500)).fit(x, y.numpy())
        found["linear classifier on pooled features, no edges"] = float(model.score(x_val, y_val.numpy()))
    return found
