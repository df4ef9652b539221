"""Mamba-3 as released by state-spaces/mamba (Apache-2.0): MambaLMHeadModel over Mamba3 layers, and the block alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ssmzoo.models.mamba3 import Mamba3, Mamba3LM
from ssmzoo.released import language
from ssmzoo.released.arguments import KERNEL, Arguments
from ssmzoo.released.catalogue import Hub, Weights
from ssmzoo.released.infer import ratio
from ssmzoo.released.language import BACKBONE, IN_BLOCKS, LM, StepByStep, infer_lm, official_lm

MODELS = (Mamba3LM,)
TELLING_KEYS = (r"^(backbone\.)?embedding\.weight", r"mixer\.B_bias")
BLOCK = Arguments(
    "Mamba3",
    {
        **{"d_state": 128, "expand": 2, "headdim": 64, "ngroups": 1, "rope_fraction": 0.5, "A_floor": 1e-4},
        **{"is_outproj_norm": False, "is_mimo": False, "mimo_rank": 4},
    },
    IN_BLOCKS
    | {
        **{"chunk_size": (64, KERNEL), "dropout": (0.0, "taken and not read there")},
        "n_layer": (None, "taken and not read there"),
    },
    required=("d_model",),
)
TABLES = (LM, BACKBONE, BLOCK)
from_official, to_official, golden = language.from_official, language.to_official, language.golden_lm


def official(state: dict, **given):
    """MambaLMHeadModel with the fields of MambaConfig, MixerModel for a file without head, or the block alone."""
    if "dt_bias" in state:
        return OfficialMamba3(**BLOCK.complete(given)), state
    return official_lm(Mamba3LM, "Mamba3", state, given)


def infer(state: dict[str, Tensor], given: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments but A_floor and those of attention layers follow from the tensors."""
    if "dt_bias" not in state:
        return infer_lm(state, mixer)
    d = state["out_proj.weight"].shape[0]
    return {"d_model": d} | mixer(state, d)


def mixer(state: dict[str, Tensor], d: int) -> dict[str, Any]:
    """in_proj has 2 e + 2 r g n + 3 h + angles rows, where angles are a quarter or half of n."""
    h, r, n = state["B_bias"].shape
    e = state["out_proj.weight"].shape[1]
    rest = state["in_proj.weight"].shape[0] - 2 * e - 3 * h
    fraction = 0.5 if (rest - n // 4) % (2 * r * n) == 0 else 1.0
    product = (rest - int(n * fraction) // 2) // (2 * r)
    inferred = {"d_state": n, "ngroups": max(1, product // n), "expand": ratio(e, d), "headdim": e // h}
    inferred |= {"rope_fraction": fraction, "is_outproj_norm": "norm.weight" in state, "is_mimo": "mimo_x" in state}
    return inferred | ({"mimo_rank": r} if "mimo_x" in state else {})


class OfficialMamba3(StepByStep, Mamba3):
    """The mixer with the inputs and outputs of mamba_ssm's."""


CATALOGUE = tuple(
    Weights(
        f"mamba3_{size.replace('-', '_')}",
        Hub(f"state-spaces/mamba3-{size}", "pytorch_model.bin", revision),
        **{"licence": "apache-2.0", "bytes": n, "sha256": digest, "tokenizer": "meta-llama/Llama-3.1-8B"},
        arguments={"vocab_size": 128256, "residual_in_fp32": True},
        note="trained on 100 B tokens of FineWeb-Edu; 16-bit weights; the tokenizer's repository asks for a licence",
    )
    for size, revision, n, digest in (
        ("siso-187m", "6792c27c00f3bb41506db1066dcd1c51bb0f4b02", 373_744_619, None),
        (
            *("mimo-187m", "8fd6e9eb7b795f2e15d7f6353251d0137980c43e", 374_640_827),
            "369db3fb9deedfc98baa95ac9166baf862dd7e03b3143afaf0d19e46a220daf6",
        ),
        ("siso-443m", "main", None, None),
        ("mimo-444m", "main", None, None),
        ("siso-893m", "e205b6e6d6075d089140d2e9170970aabc05c481", None, None),
        ("mimo-894m", "b5c7db27d1c7781d27c203bfd18601b3bbff7bc0", None, None),
        ("siso-1.5b", "5cfc721542ec9ccee768088b2fd6b7e8101219d8", None, None),
        ("mimo-1.5b", "bc6b5d0f7994fe4cb3478242e92da8daf9ee29ec", None, None),
    )
)
