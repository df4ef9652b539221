"""The complex diagonal SSMs of the SD-SSM project as released: four classes, distinguished by their keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ssmzoo.models.complex_diagonal_ssm import ComplexDiagonalModel
from ssmzoo.released.arguments import Arguments
from ssmzoo.released.infer import count
from ssmzoo.released.names import Names
from ssmzoo.released.sd_ssm import RUNNER, SWALLOWED

TELLING_KEYS = r"^blocks?\..*init_state"
MODELS = (ComplexDiagonalModel,)
ONE_LAYER = Names(("block.{rest}", "blocks.0.{rest}"), ("readout.{rest}", "mlps.0.{rest}"))


MODEL = Arguments(
    "LSRNN",
    {"embed_size": None, "num_layers": None, "scale_eigv": 1.0},
    RUNNER
    | {
        **{"nonlinearity": ("relu", SWALLOWED), "Lp_norm": (1.0, SWALLOWED), "mlp_size": (None, SWALLOWED)},
        "return_all_outputs": (False, "accepted and not read there"),
        "num_transition_matrices": (2, "handed on and not read there"),
        "mlp_multiplier": (2, "handed on and not read there"),
        "debug": (False, "kept and not read there"),
        "ignore_empty_token": (False, "kept and not read there"),
        "eps": (1e-7, "kept and not read there"),
    },
    required=("output_size", "input_size", "state_size"),
)
TABLES = (MODEL,)


def official(state: dict[str, Tensor], **given):
    """The four official classes, by their keys. `init_state` is complex, or real with a last axis of 2."""
    config = MODEL.complete(given)
    renamed = to_ours(state)
    model = _OfficialComplexDiagonal(
        config["input_size"],
        config["output_size"],
        config["state_size"],
        config["embed_size"] or len(renamed["embedding.weight"]),
        config["num_layers"] or count(renamed, "blocks.#."),
        use_B="blocks.0.B_re" in renamed,
        readout="nonlinear" if "mlps.0.2.weight" in renamed else "linear",
        scale_eigv=config["scale_eigv"],
    )
    return model, renamed


def to_ours(state: dict[str, Tensor]) -> dict[str, Tensor]:
    state = ONE_LAYER.to_ours(state)
    for key, value in state.items():
        if key.endswith("init_state") and not value.is_complex():
            state[key] = torch.view_as_complex(value.contiguous())
    return state


def from_official(model: ComplexDiagonalModel, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return to_ours(state)


def infer(state: dict[str, Tensor], given: Mapping[str, Any]) -> dict[str, Any]:
    """All sizes; scale_eigv has no weights."""
    ours = ONE_LAYER.to_ours(state)
    if "blocks.0.init_state" not in ours:
        return {}
    embed, inputs = ours["embedding.weight"].shape
    last = max(key for key in ours if key.startswith(f"mlps.{count(ours, 'mlps.#.') - 1}.") and key.endswith("weight"))
    inferred = {"state_size": len(ours["blocks.0.init_state"]), "input_size": inputs, "output_size": len(ours[last])}
    return inferred | {"embed_size": embed}


class _OfficialComplexDiagonal(ComplexDiagonalModel):
    """Official call: x (b l e) -> logits of the last step (b c)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).logits[:, -1]


def to_official(
    module: ComplexDiagonalModel, state: dict[str, Tensor], num_layers: int | None = None
) -> dict[str, Tensor]:
    """The names of the class with num_layers layers; without the argument those of the classes of one, if it fits."""
    return ONE_LAYER.to_theirs(state) if num_layers is None and len(module.blocks) == 1 else dict(state)
