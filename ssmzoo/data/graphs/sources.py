"""Where finite sets of graphs come from: scikit-learn's digits as graphs of pixels, and files of one's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from ssmzoo.data.graphs.sample import Graph, undirected

LOSS = {"classes": "cross_entropy", "labels": "bce", "values": "l1"}
METRIC = {"classes": "accuracy", "labels": "ap", "values": "mae"}


@dataclass
class Source:
    """Graphs for training and validation, and what is asked of them.

    level    graph | node | edge;  outputs  of a model;  loss, metric  names that the task knows
    classes  names of the classes, where there are classes
    position graph -> (n 2) where its nodes are drawn, where they have a place
    node_vocab, edge_vocab   sizes of integer features
    test     graphs that only `eval.py` sees
    """

    name: str
    train: list[Graph]
    val: list[Graph]
    level: str
    outputs: int
    loss: str
    metric: str
    classes: list[str] = field(default_factory=list)
    position: Callable[[Graph], Tensor] | None = None
    node_vocab: list[int] | None = None
    edge_vocab: list[int] | None = None
    test: list[Graph] = field(default_factory=list)


def split(graphs: list[Graph], fraction: float, seed: int) -> tuple[list[Graph], list[Graph]]:
    """(training, validation): a random share of `fraction` is held out, at least one graph."""
    order = np.random.default_rng(seed).permutation(len(graphs))
    held = max(1, round(fraction * len(graphs)))
    if held >= len(graphs):
        raise ValueError(f"{len(graphs)} graphs leave none to train on with data.val_fraction = {fraction}")
    return [graphs[i] for i in np.sort(order[held:])], [graphs[i] for i in np.sort(order[:held])]


def digit_graph(levels: np.ndarray, label: int, ink: float = 0.125) -> Graph:
    """(8 8) levels in [0, 1] -> one node per pixel with at least `ink`, edges to the eight neighbours among them.

    x (n 3): level, row and column in [0, 1]; edge_attr (m 1): distance in pixels
    """
    places = np.argwhere(levels >= ink)  # (n 2)
    if len(places) == 0:
        places = np.array([[levels.shape[0] // 2, levels.shape[1] // 2]])
    apart = np.abs(places[:, None] - places[None]).max(-1)  # (n n)
    pairs = np.argwhere(np.triu(apart == 1))
    edges = undirected(pairs)
    length = np.linalg.norm(places[edges[0]] - places[edges[1]], axis=1)[:, None]
    x = np.concatenate([levels[tuple(places.T)][:, None], places / (np.array(levels.shape) - 1)], axis=1)
    return {
        "x": torch.from_numpy(x.astype(np.float32)),
        "edge_index": torch.from_numpy(edges.astype(np.int64)),
        "edge_attr": torch.from_numpy(length.astype(np.float32)),
        "y": torch.tensor([label]),
    }


def digits(val_fraction: float, seed: int) -> Source:
    """The 1,797 handwritten digits that ship with scikit-learn, as graphs of their inked pixels."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ValueError(
            "graphs of digits need scikit-learn: pip install scikit-learn, or choose data=ring_transfer, or give "
            "data.path=<file.npz> of your own"
        ) from None
    found = load_digits()
    graphs = [digit_graph(image / 16, int(label)) for image, label in zip(found.images, found.target)]
    train, val = split(graphs, val_fraction, seed)

    def position(graph: Graph) -> Tensor:
        return torch.stack([graph["x"][:, 2], 1 - graph["x"][:, 1]], dim=1)

    names = [str(i) for i in range(10)]
    return Source("digits", train, val, "graph", 10, "cross_entropy", "accuracy", names, position)


def npz(path: str, val_fraction: float, seed: int) -> Source:
    """A file of arrays: node_ptr (g+1), edge_ptr (g+1), x (v f), edge_index (2 m) numbered within each graph, edge_attr
    (m k) if edges have features, y (g ...) of graphs or (v) of nodes. Whole numbers in y are classes, floating ones
    values (g c). Nothing in the file is run (`allow_pickle=False`).

    Raises ValueError for a file that is none, naming the array.
    """
    file = Path(path).expanduser()
    try:
        with np.load(file, allow_pickle=False) as found:
            arrays = {name: found[name] for name in found.files}
    except FileNotFoundError:
        raise ValueError(f"data.path={path}: there is no such file") from None
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise ValueError(f"data.path={path} is no .npz file of arrays ({error})") from None
    lacking = [name for name in ("node_ptr", "edge_ptr", "x", "edge_index", "y") if name not in arrays]
    if lacking:
        raise ValueError(f"{file.name} lacks the array {lacking[0]}; it holds {', '.join(arrays)}")
    graphs, level = cut(arrays, file.name)
    whole = np.issubdtype(arrays["y"].dtype, np.integer)
    kind = "classes" if whole else "values"
    outputs = int(arrays["y"].max()) + 1 if whole else arrays["y"].reshape(len(arrays["y"]), -1).shape[1]
    names = [str(i) for i in range(outputs)] if whole else []
    train, val = split(graphs, val_fraction, seed)
    return Source(file.name, train, val, level, outputs, LOSS[kind], METRIC[kind], names)


def cut(arrays: dict[str, np.ndarray], name: str) -> tuple[list[Graph], str]:
    """(graphs, level) of the arrays of a file."""
    nodes, edges, x, y = arrays["node_ptr"], arrays["edge_ptr"], arrays["x"], arrays["y"]
    count = len(nodes) - 1
    for ptr, of, total in (("node_ptr", "x", len(x)), ("edge_ptr", "edge_index", arrays["edge_index"].shape[-1])):
        value = arrays[ptr]
        if (
            value.ndim != 1
            or len(value) != count + 1
            or value[0] != 0
            or value[-1] != total
            or (np.diff(value) < 0).any()
        ):
            raise ValueError(f"{name}: {ptr} must ascend from 0 to {total}, the length of {of}, in {count + 1} numbers")
    if len(y) not in (count, len(x)):
        raise ValueError(f"{name}: y has {len(y)} rows; expected {count} (graphs) or {len(x)} (nodes)")
    level = "graph" if len(y) == count else "node"
    x = x if x.ndim > 1 else x[:, None]
    y = torch.from_numpy(y.astype(np.int64 if np.issubdtype(y.dtype, np.integer) else np.float32))
    if y.is_floating_point():
        y = y.reshape(len(y), -1)
    graphs, attr = [], arrays.get("edge_attr")
    attr = attr[:, None] if attr is not None and attr.ndim == 1 else attr
    for g in range(count):
        v, m = slice(nodes[g], nodes[g + 1]), slice(edges[g], edges[g + 1])
        graph = {
            "x": torch.from_numpy(x[v].astype(np.float32)),
            "edge_index": torch.from_numpy(arrays["edge_index"][:, m].astype(np.int64)),
        }
        if attr is not None:
            graph["edge_attr"] = torch.from_numpy(attr[m].astype(np.float32))
        graphs.append(graph | {"y": y[g : g + 1] if level == "graph" else y[v]})
    return graphs, level
