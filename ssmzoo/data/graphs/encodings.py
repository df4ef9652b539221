"""What is computed once per graph: eigenpairs of the Laplacian, random walks, centrality, clusters.

    lap_pe          EigVecs (n q), EigVals (n q 1): smallest pairs of D - A, NaN beyond the n-th
    rwse            pestat_RWSE (n s): diagonal of (D^-1 A)^k, k = 1 .. s
    eig_centrality  EigCentrality (n): the principal eigenvector of A, not negative, of length 1
    louvain         LouvainCluster (n): communities by modularity (networkx)

A counts an edge in both directions once. Names are GraphGPS's.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ssmzoo.data.graphs.sample import Graph
from ssmzoo.suggest import nearest

DENSE = 3000  # nodes up to which a dense matrix is decomposed


def encode(graph: Graph, names: list[str], max_freqs: int = 10, walk_steps: int = 16) -> Graph:
    """The graph with the encodings of these names. Raises ValueError for other names, naming the nearest."""
    for name in names:
        if name not in ENCODINGS:
            raise ValueError(
                f"data.encodings holds {name!r}{nearest(str(name), ENCODINGS)}; choose from {', '.join(ENCODINGS)}"
            )
    n, edges = len(graph["x"]), graph["edge_index"].numpy()
    more: Graph = {}
    for name in names:
        more |= ENCODINGS[name](edges, n, {"lap_pe": max_freqs, "rwse": walk_steps}.get(name, 0))
    return graph | more


def adjacency(edges: np.ndarray, n: int):
    """Sparse symmetric 0/1 matrix (n n); self-loops stay on its diagonal."""
    import scipy.sparse as sparse

    ones = np.ones(2 * edges.shape[1])
    rows, columns = np.concatenate([edges, edges[::-1]], axis=1)
    matrix = sparse.csr_matrix((ones, (rows, columns)), shape=(n, n))
    matrix.data[:] = 1
    return matrix


def lap_pe(edges: np.ndarray, n: int, max_freqs: int) -> dict[str, Tensor]:
    import scipy.sparse as sparse
    from scipy.sparse.linalg import eigsh

    A = adjacency(edges, n)
    A.setdiag(0)
    laplacian = sparse.diags(np.asarray(A.sum(1)).ravel()) - A
    if n <= max(DENSE, max_freqs + 1):
        values, vectors = np.linalg.eigh(laplacian.toarray())
    else:
        start = np.random.default_rng(0).standard_normal(n)
        values, vectors = eigsh(laplacian.tocsc(), max_freqs, sigma=-1e-2, which="LM", v0=start)
        order = values.argsort()
        values, vectors = values[order], vectors[:, order]
    count = min(n, max_freqs)
    found = np.full((2, n, max_freqs), np.nan, dtype=np.float32)
    found[0, :, :count] = vectors[:, :count] / np.linalg.norm(vectors[:, :count], axis=0).clip(1e-12)
    found[1, :, :count] = values[:count].clip(0)
    return {"EigVecs": torch.from_numpy(found[0]), "EigVals": torch.from_numpy(found[1])[..., None]}


def rwse(edges: np.ndarray, n: int, steps: int) -> dict[str, Tensor]:
    import scipy.sparse as sparse

    A = adjacency(edges, n)
    walk = sparse.diags(1 / np.asarray(A.sum(1)).ravel().clip(1)) @ A
    walk = walk.toarray() if n <= DENSE else walk
    power, found = walk, []
    for _ in range(steps):
        found.append(np.asarray(power.diagonal()))
        power = power @ walk
    return {"pestat_RWSE": torch.from_numpy(np.stack(found, axis=1).astype(np.float32))}


def eig_centrality(edges: np.ndarray, n: int, _: int, iterations: int = 200) -> dict[str, Tensor]:
    A, x = adjacency(edges, n), np.full(n, n**-0.5)
    for _ in range(iterations):  # of A + 1, which has the same eigenvectors and no -lambda of equal size
        x = A @ x + x
        x /= np.linalg.norm(x)
    return {"EigCentrality": torch.from_numpy(x.astype(np.float32))}


def louvain(edges: np.ndarray, n: int, _: int) -> dict[str, Tensor]:
    import networkx as nx

    graph = nx.Graph()
    graph.add_nodes_from(range(n))
    graph.add_edges_from(edges.T.tolist())
    cluster = np.zeros(n, dtype=np.int64)
    for number, members in enumerate(nx.community.louvain_communities(graph, seed=0)):
        cluster[list(members)] = number
    return {"LouvainCluster": torch.from_numpy(cluster)}


ENCODINGS = {"lap_pe": lap_pe, "rwse": rwse, "eig_centrality": eig_centrality, "louvain": louvain}
