"""Mamba as released by state-spaces/mamba (Apache-2.0): MambaLMHeadModel, its backbone, and the Mamba block alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ssmzoo.layers.mixers.mamba import Mamba
from ssmzoo.models.mamba import MambaLM
from ssmzoo.released.arguments import INITIAL, KERNEL, PLACE, Arguments
from ssmzoo.released.infer import ratio
from ssmzoo.released.language import (
    BACKBONE,
    LM,
    StepByStep,
    from_official,
    golden_lm,
    infer_lm,
    official_lm,
    to_official,
)

__all__ = ["MODELS", "TABLES", "TELLING_KEYS", "from_official", "golden", "infer", "official", "to_official"]
MODELS = (MambaLM,)
TELLING_KEYS = (r"^(backbone\.)?embedding\.weight", r"mixer\.x_proj\.weight")
DT = {"dt_min": (0.001, INITIAL), "dt_max": (0.1, INITIAL), "dt_init_floor": (1e-4, INITIAL)}
BLOCK = Arguments(
    "Mamba",
    {"d_state": 16, "d_conv": 4, "expand": 2, "dt_rank": "auto", "conv_bias": True, "bias": False},
    DT
    | {
        **{"dt_init": ("random", INITIAL), "dt_scale": (1.0, INITIAL), "use_fast_path": (True, KERNEL)},
        **{"layer_idx": (None, "names the block in a cache"), **PLACE},
    },
    required=("d_model",),
)
TABLES = (LM, BACKBONE, BLOCK)


def official(state: dict, **given):
    """MambaLMHeadModel with the fields of MambaConfig, MixerModel for a file without head, or the block alone."""
    if "A_log" in state:
        return OfficialMamba(**BLOCK.complete(given)), state
    return official_lm(MambaLM, "Mamba1", state, given)


def infer(state: dict[str, Tensor], given: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments but those of attention layers follow from the tensors."""
    if "A_log" in state:
        d = state["out_proj.weight"].shape[0]
        return {"d_model": d} | mixer(state, d)
    return infer_lm(state, mixer)


def mixer(state: dict[str, Tensor], d: int) -> dict[str, Any]:
    e, n = state["A_log"].shape
    return {
        **{"d_state": n, "d_conv": state["conv1d.weight"].shape[-1], "expand": ratio(e, d)},
        **{"dt_rank": state["dt_proj.weight"].shape[1]},
        **{"conv_bias": "conv1d.bias" in state, "bias": "in_proj.bias" in state},
    }


class OfficialMamba(StepByStep, Mamba):
    """The mixer with the inputs and outputs of mamba_ssm's."""


def golden(case) -> dict[str, Tensor]:
    return golden_lm(case) if "n_layer" in case.official_kwargs else case.run_official()
