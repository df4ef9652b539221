"""Transfer over a long distance: a class stands at one node, and is asked for at another, too far for message passing.

    ring   n nodes in a circle; source and target face each other, n // 2 edges apart. All degrees are 2.
    tree   `legs` paths of n // legs nodes from one hub; the source is the end of a path, the target the hub.

Source and target carry marks, the source shows its class; `distractors` is the share of the other nodes that show some
class too, without a mark. A model of fewer layers of message passing than the distance cannot do better than one in
`num_classes`. Without distractors an average over all nodes is enough.

An example with three classes on a ring of six, half of the nodes distracting: classes 2 - 0 - 1 -, source 0, target 3
-> the answer at node 3 is 2. Source: the ring transfer of Bodnar et al. 2021 (arXiv 2106.12575) has no distractors.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.utils.data import Dataset

from ssmzoo.data.graphs.encodings import encode
from ssmzoo.data.graphs.sample import Graph, undirected
from ssmzoo.data.loader import Draw

SHAPES = ("ring", "tree")
IGNORE = -100


def transfer_graph(
    rng: np.random.Generator, shape: str, n: int, num_classes: int, legs: int = 4, distractors: float = 0.0
) -> Graph:
    """x (n num_classes+2): class of a node, marks of source and target; y (n): the answer at the target, else -100."""
    if shape == "ring":
        pairs = np.stack([np.arange(n), (np.arange(n) + 1) % n], axis=1)
        source, target = 0, n // 2
    else:
        length = max(1, (n - 1) // legs)
        n = 1 + legs * length
        nodes = np.arange(1, n)
        pairs = np.stack([np.where((nodes - 1) % length == 0, 0, nodes - 1), nodes], axis=1)
        source, target = length, 0
    place = rng.permutation(n)  # the stored order says nothing
    pairs, source, target = place[pairs], place[source], place[target]
    shown = rng.integers(num_classes, size=n)
    x = np.zeros((n, num_classes + 2), dtype=np.float32)
    x[np.arange(n), shown] = rng.random(n) < distractors
    x[source, shown[source]], x[target] = 1, 0
    x[source, num_classes], x[target, num_classes + 1] = 1, 1
    y = np.full(n, IGNORE)
    y[target] = shown[source]
    edges = undirected(pairs).astype(np.int64)
    return {"x": torch.from_numpy(x), "edge_index": torch.from_numpy(edges), "y": torch.from_numpy(y)}


def distance(shape: str, n: int, legs: int = 4) -> int:
    """Edges between source and target."""
    return n // 2 if shape == "ring" else max(1, (n - 1) // legs)


class Transfers(Dataset):
    """`count` graphs an epoch, anew in every epoch where `fresh`; a graph is a function of its numbers."""

    def __init__(
        self,
        count: int,
        shape: str,
        nodes: tuple[int, int],
        num_classes: int,
        legs: int,
        distractors: float,
        seed: int,
        fresh: bool,
        encodings: tuple[list[str], int, int],
    ):
        self.count, self.shape, self.nodes, self.num_classes = count, shape, nodes, num_classes
        self.legs, self.distractors = legs, distractors
        self.seed, self.fresh, self.encodings = seed, fresh, encodings

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, draw: Draw) -> Graph:
        rng = np.random.default_rng([self.seed, draw.index, draw.epoch if self.fresh else 0, int(self.fresh)])
        n = int(rng.integers(self.nodes[0], self.nodes[1] + 1))
        graph = transfer_graph(rng, self.shape, n, self.num_classes, self.legs, self.distractors)
        return encode(graph, *self.encodings)
