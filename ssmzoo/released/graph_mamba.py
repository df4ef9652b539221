"""Graph-Mamba as released: GPSLayer, and LapPENodeEncoder. Names of the layer are theirs; no weights were published."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ssmzoo.layers.graph.batch import Graphs
from ssmzoo.layers.graph.encoders import LapPE, NodeEncoder
from ssmzoo.layers.graph.gps import GPSLayer
from ssmzoo.layers.graph.local import GINE, GatedGCN
from ssmzoo.models.graph_mamba_layers.order import Draws, draw
from ssmzoo.models.graph_mamba_layers.scan import NodeScan
from ssmzoo.released.arguments import Arguments
from ssmzoo.suggest import nearest

TELLING_KEYS = (r"(^|\.)self_attn\.A_log$", r"(^|\.)(norm1_attn|norm1_local)\.weight$")

ATTENTION = "an argument of attention, which the scan does not read"
LAYER = Arguments(
    "GPSLayer",
    {"dropout": 0.0},
    {"num_heads": (None, ATTENTION), "attn_dropout": (0.0, ATTENTION), "bigbird_cfg": (None, ATTENTION)},
    {
        "pna_degrees": (None, "PNA is built by model=graph_mamba model.local_model=pna, with weights of its own"),
        "equivstable_pe": (False, "the equivariant and stable encoding is not here"),
        "layer_norm": (False, "GraphNorm in place of BatchNorm is not here"),
        "batch_norm": (True, "a layer without norms is not here"),
    },
    required=("dim_h", "global_model_type", "local_gnn_type"),
)
ENCODER = Arguments(
    "LapPENodeEncoder",
    {"layers": 2, "post_layers": 0, "max_freqs": 10, "raw_norm_type": "none"},
    {},
    {
        "model": ("DeepSet", "the Transformer over eigenpairs is not here"),
        "expand_x": (True, "features that are not projected are not here"),
    },
    required=("dim_emb", "dim_in", "dim_pe"),
)
TABLES = (LAYER, ENCODER)

FULL = {"order": "degree_noise", "average": 5}
GLOBAL: dict[str, dict[str, Any]] = {  # the released names: order, orders averaged outside training, buckets
    "Mamba": {"order": "stored", "average": 1},
    "Mamba_Permute": {"order": "random", "average": 1},
    "Mamba_Degree": {"order": "degree", "average": 1},
    "Mamba_Hybrid": {"order": "random", "average": 5},
    "Mamba_Hybrid_Degree": FULL,
    "Mamba_Hybrid_Degree_Noise": FULL,
    "Mamba_Hybrid_Degree_Noise_Bucket": FULL | {"buckets": 3},
    "Mamba_Hybrid_Noise": {"order": "random", "average": 5, "buckets": 3},  # the two names are swapped there
    "Mamba_Hybrid_Noise_Bucket": {"order": "random", "average": 5},
    "Mamba_Eigen": {"order": "eigen", "average": 1},
    "Mamba_RWSE": {"order": "random_walk", "average": 1},
    "Mamba_Cluster": {"order": "cluster", "average": 5},
    "Mamba_2": {"order": "stored", "average": 1, "d_state": 8, "expand": 2},
    "Mamba_4": {"order": "stored", "average": 1, "d_state": 4, "expand": 4},
    "Mamba_SmallConv": {"order": "stored", "average": 1, "d_conv": 2},
    "Mamba_SmallState": {"order": "stored", "average": 1, "d_state": 8},
}
LOCAL = {"CustomGatedGCN": GatedGCN, "GINE": GINE, "None": None}
ENCODINGS = ("linear_A.", "pe_encoder.", "post_mlp.", "raw_norm.")


def official(state: dict[str, Tensor], **given):
    """GPSLayer(x, edge_index, edge_attr, batch) -> (x, edge_attr), or LapPENodeEncoder(x, EigVecs, EigVals) -> h."""
    if "linear_A.weight" in state:
        config = ENCODER.complete(given)
        if config["raw_norm_type"].lower() not in ("none", "batchnorm"):
            raise ValueError(f"raw_norm_type={config['raw_norm_type']!r}; choose none or batchnorm")
        pe = LapPE(
            *(config["dim_pe"], config["max_freqs"], config["layers"], config["post_layers"]),
            raw_norm=config["raw_norm_type"].lower() == "batchnorm",
        )
        encoder = NodeEncoder(config["dim_in"], config["dim_emb"], None, pe, None)
        return OfficialEncoder(encoder), {_ours(key): value for key, value in state.items()}
    config = LAYER.complete(given)
    return OfficialLayer(config["dim_h"], chosen(config), chosen_local(config), config["dropout"]), state


def chosen(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of NodeScan for a released `global_model_type`."""
    name = config["global_model_type"]
    if name not in GLOBAL:
        raise ValueError(f"global_model_type={name!r}{nearest(name, GLOBAL)}; choose one of {', '.join(GLOBAL)}")
    return GLOBAL[name]


def chosen_local(config: Mapping[str, Any]) -> nn.Module | None:
    name = config["local_gnn_type"]
    if name not in LOCAL:
        raise ValueError(f"local_gnn_type={name!r}{nearest(name, LOCAL)}; choose one of {', '.join(LOCAL)}")
    return None if LOCAL[name] is None else LOCAL[name](config["dim_h"], config["dropout"])


def _ours(key: str) -> str:
    return f"encoder.lap_pe.{key}" if key.startswith(ENCODINGS) else f"encoder.{key}"


def to_official(module: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of the layer are theirs; the encoder's stand without ours in front."""
    return {key.removeprefix("encoder.").removeprefix("lap_pe."): value for key, value in state.items()}


def infer(state: dict[str, Tensor], given: Mapping[str, Any]) -> dict[str, Any]:
    """All sizes; the order of the nodes has no weights."""
    if "linear_A.weight" not in state:
        return layer_sizes(state) if "norm2.weight" in state else {}
    layers = [key for key in state if key.startswith("pe_encoder.") and key.endswith("weight")]
    dim_pe = len(state[layers[-1]]) if layers else len(state["linear_A.weight"])
    dim_out, dim_in = state["linear_x.weight"].shape
    return {"dim_pe": dim_pe, "dim_in": dim_in, "dim_emb": dim_out + dim_pe, "layers": len(layers) + 1}


def layer_sizes(state: dict[str, Tensor]) -> dict[str, Any]:
    local = {"local_model.A.weight": "CustomGatedGCN", "local_model.nn.0.weight": "GINE"}
    found = [kind for key, kind in local.items() if key in state]
    none = not any(key.startswith("local_model.") for key in state)
    return {"dim_h": len(state["norm2.weight"])} | (
        {"local_gnn_type": found[0]} if found else {"local_gnn_type": "None"} if none else {}
    )


class OfficialLayer(GPSLayer):
    """Official call, with the batch's tensors: (x, edge_index, edge_attr, batch) -> (x, edge_attr).

    split        "train": one order, otherwise as many as the released code averages
    noise, bucket (k v)   of these orders; None: drawn
    """

    def __init__(self, dim_h: int, scan: dict[str, Any], local: nn.Module | None, dropout: float):
        super().__init__(dim_h, local, NodeScan(dim_h, **scan), dropout)

    def forward(
        self,
        x: Tensor,
        edge_index: Tensor,
        edge_attr: Tensor,
        batch: Tensor,
        noise: Tensor | None = None,
        bucket: Tensor | None = None,
        split: str = "test",
    ) -> tuple[Tensor, Tensor]:
        graphs = Graphs.of({"x": x, "edge_index": edge_index, "edge_attr": edge_attr, "batch": batch})
        count = 1 if split == "train" else self.self_attn.average
        if noise is None:
            draws = draw(graphs, count, self.self_attn.buckets, None)
        else:
            draws = Draws(noise[:count], None if bucket is None else bucket[:count].long())
        out = super().forward(graphs, draws=draws)
        return out.x, out.edge_attr


class OfficialEncoder(nn.Module):
    """Official call, with the batch's tensors: (x, EigVecs, EigVals) -> h (v dim_emb)."""

    def __init__(self, encoder: NodeEncoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor, EigVecs: Tensor, EigVals: Tensor) -> Tensor:
        edges = torch.zeros(2, 0, dtype=torch.long, device=x.device)
        return self.encoder(Graphs.of({"x": x, "edge_index": edges, "EigVecs": EigVecs, "EigVals": EigVals}))


def golden(case) -> dict[str, Tensor]:
    """The random numbers are among the inputs; `split` says how many orders are averaged."""
    module, state = case.build()
    values, more = tuple(case.inputs[name] for name in case.meta["inputs"]), {}
    if isinstance(module, OfficialLayer):
        more = {"split": case.meta["split"]}
    result = torch.func.functional_call(module.eval(), state, values, more)
    return dict(zip(case.meta["outputs"], result if isinstance(result, tuple) else (result,)))
