"""Mamba-2 in the naming of Hugging Face transformers (Apache-2.0): Mamba2ForCausalLM, Mamba2Model without head."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ssmzoo.models.mamba2 import Mamba2LM
from ssmzoo.released import language
from ssmzoo.released.arguments import INITIAL, Arguments
from ssmzoo.released.hugging_face import INERT, TOKENS, infer_hf, official_hf_lm, to_hf
from ssmzoo.released.infer import ratio
from ssmzoo.released.language import AttentionMask
from ssmzoo.released.mamba2 import groups_and_states, unclamped

MODEL_TYPE = "mamba2"
MODELS = (Mamba2LM,)
TELLING_KEYS = (r"^(backbone\.)?embeddings\.weight", r"mixer\.dt_bias")
MAMBA2 = Arguments(
    "Mamba2ForCausalLM",
    {
        **{"num_heads": 128, "head_dim": 64, "vocab_size": 32768, "hidden_size": 4096, "state_size": 128},
        **{"num_hidden_layers": 64, "layer_norm_epsilon": 1e-5, "expand": 2, "conv_kernel": 4, "n_groups": 8},
        **{"use_bias": False, "use_conv_bias": True, "hidden_act": "silu", "residual_in_fp32": True},
        **{"time_step_limit": (0.0, math.inf), "tie_word_embeddings": None, "chunk_size": 256},
        **{"clamp_steps": True},  # ours: False repeats the official single-token steps, which forget time_step_limit
    },
    INERT
    | {
        **{"pad_token_id": (1, TOKENS), "bos_token_id": (0, TOKENS), "eos_token_id": (2, TOKENS)},
        "time_step_rank": ("auto", "read by no code"),
        "intermediate_size": (None, "expand * hidden_size once more, for serving engines"),
        **{"time_step_min": (0.001, INITIAL), "time_step_max": (0.1, INITIAL), "time_step_floor": (1e-4, INITIAL)},
    },
    {"rms_norm": (True, "transformers' Mamba-2 has RMSNorm only")},  # what serving engines ask for
)
TABLES = (MAMBA2,)
from_official, to_official = language.from_official, to_hf


def official(state: dict, **given):
    """The arguments are Mamba2Config's, and clamp_steps. Without a head the outputs are the hidden states."""
    config = MAMBA2.complete(given)
    h, p, d, expand = (config[key] for key in ("num_heads", "head_dim", "hidden_size", "expand"))
    if int(d * expand) != h * p:
        raise ValueError(f"hidden_size * expand must equal num_heads * head_dim, got {d} * {expand} and {h} * {p}")
    mixer = {
        "d_state": config["state_size"],
        "d_conv": config["conv_kernel"],
        "expand": expand,
        "headdim": p,
        "ngroups": config["n_groups"],
        "chunk_size": config["chunk_size"],
        "norm_eps": config["layer_norm_epsilon"],
        "bias": config["use_bias"],
        "conv_bias": config["use_conv_bias"],
        "dt_limit": config["time_step_limit"],
        "clamp_steps": config["clamp_steps"],
    }
    return official_hf_lm(Mamba2HF, state, config, mixer, tied=False)


def infer(state: dict[str, Tensor], given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of Mamba2Config that the tensors tell: of n_groups and state_size only the product."""
    return infer_hf(state, functools.partial(_mixer, given))


def _mixer(given: Mapping[str, Any], state: dict[str, Tensor], d: int) -> dict[str, Any]:
    h, e = len(state["A_log"]), state["out_proj.weight"].shape[1]
    product = (state["conv1d.weight"].shape[0] - e) // 2
    groups, n = groups_and_states(product, given.get("n_groups"), given.get("state_size"), MAMBA2.default("n_groups"))
    return {
        **{"num_heads": h, "head_dim": e // h, "expand": ratio(e, d), "conv_kernel": state["conv1d.weight"].shape[-1]},
        **{"n_groups": groups, "state_size": n, "use_bias": "in_proj.bias" in state},
        **{"use_conv_bias": "conv1d.bias" in state},
    }


class Mamba2HF(AttentionMask, Mamba2LM):
    """Mamba-2 with the inputs of transformers' Mamba2ForCausalLM."""


def golden(case) -> dict[str, Tensor]:
    case.meta["official_kwargs"] = unclamped(case)
    return language.golden_lm(case)
