"""Mamba-2 as released by state-spaces/mamba (Apache-2.0): MambaLMHeadModel, its backbone, Mamba2 and Mamba2Simple."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ssmzoo.layers.mixers.mamba2 import Mamba2
from ssmzoo.models.mamba2 import Mamba2LM
from ssmzoo.released import language
from ssmzoo.released.arguments import INITIAL, KERNEL, Arguments
from ssmzoo.released.catalogue import NEOX, Hub, Weights
from ssmzoo.released.infer import ratio
from ssmzoo.released.language import BACKBONE, IN_BLOCKS, LM, StepByStep, infer_lm, official_lm

MODELS = (Mamba2LM,)
TELLING_KEYS = (r"^(backbone\.)?embedding\.weight", r"mixer\.dt_bias", r"mixer\.conv1d")
SHARED = {"d_conv": 4, "expand": 2, "ngroups": 1, "dt_limit": (0.0, math.inf), "bias": False, "conv_bias": True}
SHARED |= {"chunk_size": 256}
WITHOUT = IN_BLOCKS | {
    **{"conv_init": (None, INITIAL), "A_init_range": ((1, 16), INITIAL)},
    "use_mem_eff_path": (True, KERNEL),
}
ONE_PROCESS = "the weights of one process; tensor-parallel shards must be joined first"
BLOCK = Arguments(
    "Mamba2",
    SHARED
    | {"d_state": 128, "headdim": 64, "d_ssm": None, "D_has_hdim": False, "rmsnorm": True, "norm_before_gate": False}
    | {"clamp_steps": True},  # ours: False repeats the official single-token steps, which forget dt_limit
    WITHOUT | {"sequence_parallel": (True, "how processes share a sequence")},
    {"process_group": (None, ONE_PROCESS)},
    required=("d_model",),
)
SIMPLE = Arguments(
    "Mamba2Simple",
    SHARED | {"d_state": 64, "headdim": 128, "learnable_init_states": False, "activation": "swish"},
    WITHOUT,
    required=("d_model",),
)
TABLES = (LM, BACKBONE, BLOCK, SIMPLE)
from_official, to_official = language.from_official, language.to_official


def official(state: dict, **given):
    """MambaLMHeadModel with the fields of MambaConfig, MixerModel for a file without head, or a block alone:
    Mamba2Simple when it is given one of that class's own arguments or holds initial states, else Mamba2."""
    if "A_log" not in state:
        return official_lm(Mamba2LM, "Mamba2", state, given)
    if not is_simple(state, given):
        return OfficialMamba2(**BLOCK.complete(given)), state
    arguments = SIMPLE.complete(given)
    if (activation := arguments.pop("activation")) not in ("swish", "silu"):
        raise ValueError(f"activation must be 'swish' or its other name 'silu', got {activation!r}")
    return OfficialMamba2(**arguments, norm_groups=1), state


def is_simple(state: dict[str, Tensor], given: Mapping[str, Any]) -> bool:
    return "init_states" in state or bool({"learnable_init_states", "activation"} & given.keys())


def infer(state: dict[str, Tensor], given: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments but those of attention layers follow from the tensors; of ngroups and d_state only the product."""
    if "A_log" not in state:
        return infer_lm(state, functools.partial(mixer, given.get("ssm_cfg") or {}))
    d = state["out_proj.weight"].shape[0]
    inferred = {"d_model": d} | mixer(given, state, d)
    if is_simple(state, given):
        inferred = {k: v for k, v in inferred.items() if k in SIMPLE.names}
        inferred |= {"learnable_init_states": "init_states" in state}
    return inferred


def mixer(given: Mapping[str, Any], state: dict[str, Tensor], d: int) -> dict[str, Any]:
    h, e = len(state["A_log"]), state["out_proj.weight"].shape[1]
    product = (state["in_proj.weight"].shape[0] - 2 * e - h) // 2  # ngroups d_state
    channels = state["conv1d.weight"].shape[0] - 2 * product  # that go through the SSM
    groups, n = groups_and_states(product, given.get("ngroups"), given.get("d_state"), BLOCK.default("ngroups"))
    return {
        **{"d_state": n, "ngroups": groups, "d_conv": state["conv1d.weight"].shape[-1], "expand": ratio(e, d)},
        **{"headdim": channels // h, "d_ssm": None if channels == e else channels},
        **{"D_has_hdim": len(state["D"]) != h, "rmsnorm": "norm.weight" in state},
        **{"conv_bias": "conv1d.bias" in state, "bias": "in_proj.bias" in state},
    }


def groups_and_states(product: int, groups: int | None, states: int | None, default: int) -> tuple[int, int]:
    """Groups and states per group, of which the tensors tell the product: from the one that is given, or the class's
    default number of groups."""
    if groups is None:
        groups = max(1, product // states) if states else default
    return groups, product // groups


class OfficialMamba2(StepByStep, Mamba2):
    """The mixer with the inputs and outputs of mamba_ssm's."""


def golden(case) -> dict[str, Tensor]:
    case.meta["official_kwargs"] = unclamped(case)
    return language.golden_lm(case)


def unclamped(case) -> dict:
    """The case's constructor arguments with the official steps, by which its continuations were decoded."""
    kwargs = case.official_kwargs
    if "ssm_cfg" in kwargs:
        return kwargs | {"ssm_cfg": dict(kwargs["ssm_cfg"]) | {"clamp_steps": False}}
    simple = is_simple(case.params, kwargs) or "embeddings.weight" in case.params
    return kwargs if simple else kwargs | {"clamp_steps": False}


CATALOGUE = tuple(
    Weights(
        f"mamba2_{size}",
        Hub(f"state-spaces/mamba2-{size}", "pytorch_model.bin", revision),
        **{"licence": licence, "bytes": n, "sha256": digest, "tokenizer": NEOX, "metric": metric},
        arguments={"vocab_size": 50277, "residual_in_fp32": True, "pad_vocab_size_multiple": 16},
        note="trained on 300 B tokens of the Pile; 16-bit weights",
    )
    for size, revision, licence, n, digest, metric in (
        (
            *("130m", "3a5aea0c25d0fb43cc360e2c2aac82c26e3eed49", None, 258_059_314),
            *("f786aff903d8b6f2cef67ff2b1db06a9f44e7780340e6ea6d3dead16b52fc501", ""),
        ),
        ("370m", "main", None, None, None, ""),
        ("780m", "main", "apache-2.0", None, None, ""),
        ("1.3b", "main", "apache-2.0", None, None, ""),
        (
            *("2.7b", "99b226cc377d131cccc610ed4346db564f381f1e", "apache-2.0", 5_405_424_282),
            "254d89bfef6dd9f44c8e3f54e0730af3f10c482969117cb37fb33486348b00be",
            "zero shot: LAMBADA perplexity 4.10, accuracy 69.7 %; HellaSwag 66.6 %; PIQA 76.4 %",
        ),
    )
)
CATALOGUE += (
    Weights(
        "mamba2attn_2.7b",
        Hub("state-spaces/mamba2attn-2.7b", "pytorch_model.bin"),
        tokenizer=NEOX,
        arguments={
            **{"vocab_size": 50277, "residual_in_fp32": True, "pad_vocab_size_multiple": 16},
            "attn_cfg": {"causal": True, "d_conv": 4, "head_dim": 128, "num_heads": 30, "rotary_emb_dim": 64}
            | {"out_proj_bias": False, "qkv_proj_bias": False},
        },
        metric="zero shot: LAMBADA perplexity 3.85, accuracy 71.1 %; HellaSwag 67.8 %; PIQA 75.2 %",
    ),
)
