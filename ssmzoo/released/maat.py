"""MAAT and Anomaly Transformer as released: MambaAnomalyTransformer, AnomalyTransformer.

Our names are theirs, but for a LayerNorm in every attention layer that they never call.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ssmzoo.layers.series.encoder import POSITIONS
from ssmzoo.models.anomaly_transformer import AnomalyTransformer
from ssmzoo.models.maat import MAAT
from ssmzoo.released.arguments import Arguments

TELLING_KEYS = (r"value_embedding\.tokenConv\.weight", r"attention\.sigma_projection\.weight")
MODELS = (MAAT, AnomalyTransformer)
UNUSED = "attention.norm."

SHARED = {
    **{"d_model": 512, "n_heads": 8, "e_layers": 3, "d_ff": 512, "dropout": 0.0, "activation": "gelu"},
    "output_attention": True,
}
REQUIRED = ("win_size", "enc_in", "c_out")
SPARSE = {"block_size": 10, "use_sparse_attention": False}  # the latter of its AnomalyAttention; never set there
BASELINE = Arguments(
    "AnomalyTransformer",
    SHARED,
    {"block_size": (10, "of the sparse attention of MAAT")},
    {"use_sparse_attention": (False, "Anomaly Transformer attends to the whole window")},
    required=REQUIRED,
)
MAMBA = Arguments("MambaAnomalyTransformer", SHARED | SPARSE, required=REQUIRED)
TABLES = (MAMBA, BASELINE)


def official(state: dict[str, Tensor], **given):
    """MambaAnomalyTransformer where the checkpoint has a Mamba, AnomalyTransformer otherwise."""
    mamba = any(key.startswith("encoder.mamba.") for key in state)
    config = (MAMBA if mamba else BASELINE).complete(given)
    if config["c_out"] != config["enc_in"]:
        raise ValueError(
            f"c_out={config['c_out']} and enc_in={config['enc_in']}: the score compares what goes in with what comes "
            f"out, so both must be the channels of the series"
        )
    kind, options = AnomalyTransformer, {}
    if mamba:
        sparse = config["use_sparse_attention"]
        kind = MAAT
        options = {"attention": "sparse" if sparse else "full", "causal": not sparse}
        options["block_size"] = config["block_size"]
    sizes = {k: v for k, v in config.items() if k in SHARED.keys() | {"enc_in"} and k != "output_attention"}
    model = _Official(kind(**sizes, **options), config["win_size"], config["output_attention"])
    return model, {f"model.{key}": value for key, value in from_official(model.model, state).items()}


def from_official(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the norms that nothing calls."""
    return {key: value for key, value in state.items() if UNUSED not in key}


def to_official(module: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With those norms as they were made, which the official class insists on."""
    found = {key.removeprefix("model."): value for key, value in state.items()}
    for key, bias in list(found.items()):
        if key.endswith("attention.out_projection.bias"):
            stem = key.removesuffix("out_projection.bias")
            found |= {f"{stem}norm.weight": torch.ones_like(bias), f"{stem}norm.bias": torch.zeros_like(bias)}
    return found


def infer(state: Mapping[str, Tensor], given: Mapping[str, Any]) -> dict[str, Any]:
    """All sizes but the window, for which any length up to the table's 5000 serves."""
    if "embedding.value_embedding.tokenConv.weight" not in state:
        return {}
    d_model, channels, _ = state["embedding.value_embedding.tokenConv.weight"].shape
    layers = [key for key in state if key.endswith(".attention.sigma_projection.weight")]
    return {
        **{"enc_in": channels, "c_out": len(state["projection.weight"]), "d_model": d_model, "e_layers": len(layers)},
        "n_heads": len(state["encoder.attn_layers.0.attention.sigma_projection.weight"]),
        "d_ff": len(state["encoder.attn_layers.0.conv1.weight"]),
        "win_size": given.get("win_size", POSITIONS),
    }


class _Official(nn.Module):
    """Official call: x (b l c) -> (reconstruction, series, prior, sigma), lists over layers, or the reconstruction."""

    def __init__(self, model: nn.Module, win_size: int, output_attention: bool):
        super().__init__()
        self.model, self.win_size, self.output_attention = model, win_size, output_attention

    def forward(self, x: Tensor):
        if x.shape[1] > self.win_size:
            raise ValueError(f"windows of {x.shape[1]} points are longer than win_size = {self.win_size}")
        out = self.model(x)
        if not self.output_attention:
            return out.reconstruction
        sigma = [s.unsqueeze(-1).expand_as(p) for s, p in zip(out.sigma, out.prior)]
        return out.reconstruction, list(out.series), list(out.prior), sigma
