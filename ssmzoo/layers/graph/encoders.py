"""From what a data set knows of nodes and edges to vectors, encodings of position included."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ssmzoo.layers.graph.batch import Graphs


class LapPE(nn.Module):
    """A set of Laplacian eigenpairs per node -> (v dim_pe), by an MLP per pair and a sum (DeepSet).

    dim_pe        width of the encoding;  max_freqs  pairs per node
    layers        of the MLP, 2 -> 2 dim_pe -> ... -> dim_pe;  post_layers  after the sum
    raw_norm      BatchNorm over the pairs first

    The sign of every frequency is random in training, the same for the whole batch; NaN pairs (of graphs with fewer
    nodes than frequencies) count nothing. Source: Kreuzer et al. 2021 (arXiv 2106.03893); names of GraphGPS.
    """

    def __init__(
        self, dim_pe: int = 16, max_freqs: int = 10, layers: int = 2, post_layers: int = 0, raw_norm: bool = False
    ):
        super().__init__()
        if min(dim_pe, max_freqs, layers) < 1:
            raise ValueError(f"lap_pe: dim_pe={dim_pe}, max_freqs={max_freqs} and layers={layers} must be at least 1")
        self.dim_pe, self.max_freqs = dim_pe, max_freqs
        self.raw_norm = nn.BatchNorm1d(max_freqs) if raw_norm else None
        self.linear_A = nn.Linear(2, dim_pe if layers == 1 else 2 * dim_pe)
        self.pe_encoder = nn.Sequential(nn.ReLU(), *_hidden(dim_pe, layers - 1))
        widths = [dim_pe, *([2 * dim_pe] * (post_layers - 1)), dim_pe]
        post = [m for a, b in zip(widths, widths[1:]) for m in (nn.Linear(a, b), nn.ReLU())]
        self.post_mlp = nn.Sequential(*post) if post_layers else None

    def forward(self, graphs: Graphs) -> Tensor:
        vectors, values = needed(graphs, "EigVecs", "lap_pe"), needed(graphs, "EigVals", "lap_pe")
        if vectors.shape[1] != self.max_freqs:
            raise ValueError(f"EigVecs has {vectors.shape[1]} frequencies, the model max_freqs={self.max_freqs}")
        if self.training:
            vectors = vectors * (torch.rand(self.max_freqs, device=vectors.device) < 0.5).to(vectors).mul(2).sub(1)
        pairs = torch.stack([vectors, values.reshape_as(vectors)], dim=-1)  # (v q 2)
        lacking = pairs[..., :1].isnan()
        pairs = pairs.nan_to_num(0.0)
        pairs = pairs if self.raw_norm is None else self.raw_norm(pairs)
        pe = self.pe_encoder(self.linear_A(pairs)).masked_fill(lacking, 0).sum(1)  # (v p)
        return pe if self.post_mlp is None else self.post_mlp(pe)


def _hidden(dim_pe: int, count: int) -> list[nn.Module]:
    """`count` layers from width 2 dim_pe to dim_pe."""
    widths = [2 * dim_pe] * count + [dim_pe]
    return [m for a, b in zip(widths, widths[1:]) for m in (nn.Linear(a, b), nn.ReLU())]


class RWSE(nn.Module):
    """Probabilities of being back after 1 .. steps random steps -> (v dim_pe), by BatchNorm and a linear map.

    Source: Dwivedi et al. 2022 (arXiv 2110.07875); names of GraphGPS.
    """

    def __init__(self, dim_pe: int = 16, steps: int = 16):
        super().__init__()
        self.dim_pe, self.steps = dim_pe, steps
        self.raw_norm, self.pe_encoder = nn.BatchNorm1d(steps), nn.Linear(steps, dim_pe)

    def forward(self, graphs: Graphs) -> Tensor:
        walks = needed(graphs, "pestat_RWSE", "rwse")
        if walks.shape[1] != self.steps:
            raise ValueError(f"pestat_RWSE has {walks.shape[1]} steps, the model steps={self.steps}")
        return self.pe_encoder(self.raw_norm(walks))


ENCODED_AS = {
    **dict.fromkeys(("EigVecs", "EigVals"), "lap_pe"),
    "pestat_RWSE": "rwse",
    "EigCentrality": "eig_centrality",
    "LouvainCluster": "louvain",
}


def needed(graphs: Graphs, name: str, asked_by: str) -> Tensor:
    """A tensor of the batch; ValueError when the data does not have it."""
    value = getattr(graphs, name)
    if value is None:
        raise ValueError(
            f"{asked_by} needs {name} for every node; let the data compute it: data.encodings=[{ENCODED_AS[name]}]"
        )
    return value


class Categories(nn.Module):
    """Integers (n c) -> (n d): the sum of an embedding per column (OGB's atom and bond encoders)."""

    def __init__(self, vocab: Sequence[int], d_model: int):
        super().__init__()
        self.embedding_list = nn.ModuleList(nn.Embedding(size, d_model) for size in vocab)
        for embedding in self.embedding_list:
            nn.init.xavier_uniform_(embedding.weight)

    def forward(self, x: Tensor) -> Tensor:
        for column, embedding in enumerate(self.embedding_list):
            if int(x[:, column].max()) >= embedding.num_embeddings:
                raise ValueError(
                    f"column {column} holds category {int(x[:, column].max())}, the model knows "
                    f"{embedding.num_embeddings} (0 to {embedding.num_embeddings - 1})"
                )
        return sum(embedding(x[:, column]) for column, embedding in enumerate(self.embedding_list))


class NodeEncoder(nn.Module):
    """concat(features (v d - p), encodings (v p)), features by a linear map or, with `vocab`, by embeddings."""

    def __init__(
        self, node_dim: int, d_model: int, vocab: Sequence[int] | None, lap_pe: LapPE | None, rwse: RWSE | None
    ):
        super().__init__()
        own = d_model - sum(e.dim_pe for e in (lap_pe, rwse) if e is not None)
        if own < 1:
            raise ValueError(f"d_model = {d_model} leaves no room beside encodings {d_model - own} wide")
        self.node_dim = node_dim if vocab is None else len(vocab)
        self.linear_x = nn.Linear(node_dim, own) if vocab is None else Categories(vocab, own)
        self.lap_pe, self.rwse = lap_pe, rwse

    def forward(self, graphs: Graphs) -> Tensor:
        x = features(graphs.x, self.linear_x, self.node_dim, "x", "a node")
        return torch.cat([x, *(e(graphs) for e in (self.lap_pe, self.rwse) if e is not None)], dim=-1)


class EdgeEncoder(nn.Module):
    """Edges (m d): a linear map of edge_dim features, embeddings of `vocab`, or one learnt vector."""

    def __init__(self, edge_dim: int, d_model: int, vocab: Sequence[int] | None = None):
        super().__init__()
        self.edge_dim = edge_dim if vocab is None else len(vocab)
        if vocab is not None:
            self.encoder = Categories(vocab, d_model)
        else:
            self.encoder = nn.Linear(edge_dim, d_model) if edge_dim else nn.Embedding(1, d_model)

    def forward(self, graphs: Graphs) -> Tensor:
        if not self.edge_dim:
            return self.encoder(graphs.edge_index.new_zeros(graphs.edge_index.shape[1]))
        if graphs.edge_attr is None:
            raise ValueError(f"the model was built for {self.edge_dim} features an edge (edge_dim), the batch has none")
        return features(graphs.edge_attr, self.encoder, self.edge_dim, "edge_attr", "an edge")


def features(x: Tensor, encoder: nn.Module, width: int, name: str, of: str) -> Tensor:
    """Encode what has the width that the encoder was built for; ValueError otherwise."""
    if x.shape[1] != width:
        built = "node_dim" if name == "x" else "edge_dim"
        raise ValueError(f"{name} has {x.shape[1]} features {of}, the model was built for {width} ({built})")
    if isinstance(encoder, nn.Linear):
        return encoder(x.to(encoder.weight.dtype))
    if x.is_floating_point():
        raise ValueError(f"{name} is {x.dtype}; embeddings need whole numbers")
    return encoder(x.long()) if len(x) else x.new_zeros(0, encoder.embedding_list[0].embedding_dim, dtype=torch.float)
