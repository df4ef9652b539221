"""In which order the scan reads the nodes of a graph.

    stored        as they come                                   Mamba
    random        any                                            Mamba_Permute, _Hybrid, _Hybrid_Noise_Bucket
    degree        degree, ties as stored                         Mamba_Degree
    degree_noise  degree, ties at random                         Mamba_Hybrid_Degree, _Hybrid_Degree_Noise(_Bucket)
    eigen         degree, then eigenvector centrality            Mamba_Eigen
    random_walk   degree, then fewer returns of a random walk    Mamba_RWSE
    cluster       degree, then Louvain clusters in random order  Mamba_Cluster

All ascend: the scan is causal, so that a node that comes late has seen the others. Continuous scores are jittered by
one standard deviation of noise in training. The names on the right are those of the released code.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ssmzoo.layers.graph.batch import Graphs
from ssmzoo.layers.graph.encoders import needed
from ssmzoo.suggest import nearest

ORDERS = ("stored", "random", "degree", "degree_noise", "eigen", "random_walk", "cluster")
DRAWN = ("random", "degree_noise", "cluster")  # differ from draw to draw


class Draws(NamedTuple):
    """Random numbers of k orders: noise (k v) in [0, 1) per node, bucket (k v) of every node or None."""

    noise: Tensor
    bucket: Tensor | None


def draw(graphs: Graphs, count: int, buckets: int, seed: int | None) -> Draws:
    """Fresh ones, or with a seed those of the node's number in its graph, whatever else is in the batch."""
    v, device = len(graphs.x), graphs.x.device
    if seed is None:
        noise = torch.rand(count, v, device=device)
        return Draws(noise, torch.randint(buckets, (count, v), device=device) if buckets > 1 else None)
    number = graphs.index_in_graph()
    generator = torch.Generator().manual_seed(seed)
    table = torch.rand(int(number.max()) + 1, 2 * count, generator=generator).to(device)  # its first rows are the same
    noise, other = table[number].mT.chunk(2)  # (k v) each
    return Draws(noise.contiguous(), (other * buckets).long() if buckets > 1 else None)


def scan_order(order: str, graphs: Graphs, draws: Draws, training: bool) -> tuple[Tensor, Tensor]:
    """-> (k v) node at every place of k sequences, (k v) number of the sequence (graph, or graph and bucket) there."""
    if order not in ORDERS:
        raise ValueError(f"order is {order!r}{nearest(str(order), ORDERS)}; choose one of {', '.join(ORDERS)}")
    k, v = draws.noise.shape
    sequence = graphs.batch.expand(k, v)
    if draws.bucket is not None:
        sequence = sequence * (int(draws.bucket.max()) + 1) + draws.bucket.long()
    first, first_key = ties(order, graphs, draws, training), sequence
    if order not in ("stored", "random"):
        degree = graphs.degree()
        first_key = sequence * (degree.max() + 1) + degree
    if first is None:
        places = first_key.argsort(dim=1, stable=True)
    else:
        places = first.argsort(dim=1, stable=True)
        places = places.gather(1, first_key.gather(1, places).argsort(dim=1, stable=True))
    return places, sequence.gather(1, places)


def ties(order: str, graphs: Graphs, draws: Draws, training: bool) -> Tensor | None:
    """(k v) what decides between nodes of equal degree; None: the order they are stored in."""
    if order in ("stored", "degree"):
        return None
    if order == "eigen":
        return _jittered(needed(graphs, "EigCentrality", "order=eigen"), draws, training)
    if order == "random_walk":
        return _jittered(-needed(graphs, "pestat_RWSE", "order=random_walk").sum(1), draws, training)
    if order == "cluster":
        clusters = needed(graphs, "LouvainCluster", "order=cluster").long()
        number = clusters + graphs.batch * (clusters.max() + 1)  # a random place for every cluster of every graph
        first = draws.noise.new_full((len(draws.noise), int(number.max()) + 1), 2.0)
        return first.scatter_reduce(1, number.expand_as(draws.noise), draws.noise, "amin").gather(
            1, number.expand_as(draws.noise)
        )
    return draws.noise


def _jittered(score: Tensor, draws: Draws, training: bool) -> Tensor:
    if not training:
        return score.expand_as(draws.noise)
    normal = torch.erfinv(draws.noise.clamp(1e-6, 1 - 1e-6) * 2 - 1) * 2**0.5  # of the same draws
    return score + score.std(unbiased=False) * normal
