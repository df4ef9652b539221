"""Data sets of PyTorch Geometric by name; each is fetched by that library, once, from where it keeps them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from ssmzoo.data.graphs.sample import Graph
from ssmzoo.data.graphs.sources import LOSS, METRIC, Source, split
from ssmzoo.suggest import nearest

ATOMS = [119, 5, 12, 12, 10, 6, 6, 2, 2]  # OGB's features of an atom, sizes of their vocabularies
BONDS = [5, 6, 2]


class Entry(NamedTuple):
    """cls  class in torch_geometric.datasets;  name  its argument, None without;  splits  what it calls them, None: one
    whole that is split here;  more  its further arguments"""

    cls: str
    name: str | None
    level: str
    outputs: int
    loss: str
    metric: str
    node_vocab: list[int] | None = None
    edge_vocab: list[int] | None = None
    splits: tuple[str, str, str] | None = ("train", "val", "test")
    more: dict[str, Any] = {}


WEIGHTED = ("weighted_cross_entropy",)
KNOWN = {
    "ZINC": Entry("ZINC", None, "graph", 1, "l1", "mae", [28], [4], more={"subset": True}),
    "ZINC-full": Entry("ZINC", None, "graph", 1, "l1", "mae", [28], [4]),
    "Peptides-func": Entry("LRGBDataset", "Peptides-func", "graph", 10, "bce", "ap", ATOMS, BONDS),
    "Peptides-struct": Entry("LRGBDataset", "Peptides-struct", "graph", 11, "l1", "mae", ATOMS, BONDS),
    "PascalVOC-SP": Entry("LRGBDataset", "PascalVOC-SP", "node", 21, *WEIGHTED, "macro_f1"),
    "COCO-SP": Entry("LRGBDataset", "COCO-SP", "node", 81, *WEIGHTED, "macro_f1"),
    "PCQM-Contact": Entry("LRGBDataset", "PCQM-Contact", "edge", 1, "bce", "mrr", ATOMS, BONDS),
    "MNIST": Entry("GNNBenchmarkDataset", "MNIST", "graph", 10, "cross_entropy", "accuracy"),
    "CIFAR10": Entry("GNNBenchmarkDataset", "CIFAR10", "graph", 10, "cross_entropy", "accuracy"),
    "PATTERN": Entry("GNNBenchmarkDataset", "PATTERN", "node", 2, *WEIGHTED, "class_accuracy"),
    "CLUSTER": Entry("GNNBenchmarkDataset", "CLUSTER", "node", 6, *WEIGHTED, "class_accuracy"),
    "MalNetTiny": Entry("MalNetTiny", None, "graph", 5, "cross_entropy", "accuracy"),
    "FakeDataset": Entry(*("FakeDataset", None, "graph", 0, "", ""), splits=None, more={"num_graphs": 64}),  # offline
}


def pyg(name: str, root: Path, val_fraction: float, seed: int) -> Source:
    """A set of KNOWN, or TU/<name> (split here). Raises ValueError for other names, and without PyTorch Geometric."""
    tu = name.removeprefix("TU/") if name.startswith("TU/") else None
    if tu is None and name not in KNOWN:
        raise ValueError(
            f"data.dataset = 'pyg/{name}'{nearest(name, KNOWN)}; choose pyg/TU/<name> or pyg/ and one of "
            f"{', '.join(KNOWN)}"
        )
    try:
        import torch_geometric.datasets as datasets
        from torch_geometric import transforms
    except ImportError:
        raise ValueError(f"data.dataset = 'pyg/{name}' needs PyTorch Geometric: pip install torch_geometric") from None
    entry = KNOWN[name] if tu is None else Entry("TUDataset", tu, "graph", 0, "", "", splits=None)
    profile = transforms.LocalDegreeProfile()  # five features of a node for sets that have none
    cls, given = getattr(datasets, entry.cls), dict(entry.more)
    if entry.cls != "FakeDataset":
        given["root"] = str(root / entry.cls)
    if entry.name is not None:
        given["name"] = entry.name

    def read(data) -> Graph:
        return sample(data if data.x is not None else profile(data), entry)

    try:
        if entry.splits is not None:
            train, val, test = ([read(d) for d in cls(split=s, **given)] for s in entry.splits)
        else:
            (train, val), test = split([read(d) for d in cls(**given)], val_fraction, seed), []
    except OSError as error:  # no network, a full disk
        raise ValueError(f"data.dataset = 'pyg/{name}' could not be fetched or read: {error}") from None
    level, outputs, loss, metric = entry.level, entry.outputs, entry.loss, entry.metric
    if not entry.outputs:
        values = torch.cat([g["y"] for g in train + val])
        kind = "values" if values.is_floating_point() else "classes"
        outputs = values.shape[1] if kind == "values" else int(values.max()) + 1
        loss, metric = LOSS[kind], METRIC[kind]
    names = [str(i) for i in range(outputs)] if "cross_entropy" in loss else []
    vocab = (entry.node_vocab, entry.edge_vocab)
    return Source(f"pyg/{name}", train, val, level, outputs, loss, metric, names, None, *vocab, test)


def sample(data, entry: Entry) -> Graph:
    """A Data of PyTorch Geometric as our dict; positions (superpixels) stand beside the other features of a node."""
    x = data.x if data.x.ndim > 1 else data.x[:, None]
    if entry.name in ("MNIST", "CIFAR10"):
        x = torch.cat([x, data.pos.to(x.dtype)], dim=1)
    graph = {"x": x if entry.node_vocab else x.float(), "edge_index": data.edge_index}
    if data.edge_attr is not None:
        attr = data.edge_attr if data.edge_attr.ndim > 1 else data.edge_attr[:, None]
        graph["edge_attr"] = attr if entry.edge_vocab else attr.float()
    y = data.y if data.y is not None else getattr(data, "edge_label", None)
    if entry.level == "edge":
        return graph | {"edge_label_index": data.edge_label_index, "y": data.edge_label.float()}
    if entry.level == "node":
        return graph | {"y": y.long().flatten()}
    if y.is_floating_point():
        return graph | {"y": y.float().reshape(1, -1)}
    return graph | {"y": y.long().reshape(-1)[:1] if entry.outputs != 10 or entry.loss != "bce" else y.reshape(1, -1)}
