"""Mamba as released by state-spaces/mamba (Apache-2.0): MambaLMHeadModel, its backbone, and the Mamba block alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ssmzoo.layers.mixers.mamba import Mamba
from ssmzoo.models.mamba import MambaLM
from ssmzoo.released import language
from ssmzoo.released.arguments import INITIAL, KERNEL, Arguments
from ssmzoo.released.catalogue import NEOX, Hub, Weights
from ssmzoo.released.infer import ratio
from ssmzoo.released.language import BACKBONE, IN_BLOCKS, LM, StepByStep, infer_lm, official_lm

MODELS = (MambaLM,)
TELLING_KEYS = (r"^(backbone\.)?embedding\.weight", r"mixer\.x_proj\.weight")
BLOCK = Arguments(
    "Mamba",
    {"d_state": 16, "d_conv": 4, "expand": 2, "dt_rank": "auto", "conv_bias": True, "bias": False},
    IN_BLOCKS | {"dt_init": ("random", INITIAL), "dt_scale": (1.0, INITIAL), "use_fast_path": (True, KERNEL)},
    required=("d_model",),
)
TABLES = (LM, BACKBONE, BLOCK)
from_official, to_official, golden = language.from_official, language.to_official, language.golden_lm


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


PILE = (  # preset, revision, bytes, SHA-256
    ("130m", "c4dcd5d65dff7d0bff5a4c97e30d82e57190f1b0", 516_618_642)
    + ("29a023467229397eb03fd31e088c08c9193b734249f0c07d51af03873162e723",),
    ("370m", "b6c47221dc4908532cc9773d469d6b8cbe3f0762", 1_486_219_538)
    + ("d2193f87805948c4d01234056d9fbb04ff9a55dbf70547ab7329af971dfdef37",),
    ("790m", "557be521b8e2f9c53c00f552cee8b03adfa2e69b", 3_172_970_770)
    + ("2101e887b173fd431552d9d2cc8e2cc18f234648d504be851f1ccec50aaf0ae3",),
    ("1.4b", "ef1092d8dc2123005d7d608c12665be82cd4c576", 5_488_869_150)
    + ("d342e29cf5713830877b54a51cbd7c48bf02b1c10aa2e2169a2988669d71f191",),
    ("2.8b", "b342b33a0c4718008a85682ffbb94a0a51d7ea16", 11_073_592_474)
    + ("ef6452a6515c6a33f2a2febd53e58602dfb17e5c0871d25c29cf88285a80c09c",),
)
CATALOGUE = tuple(
    Weights(
        f"mamba_{size}",
        Hub(f"state-spaces/mamba-{size}", "pytorch_model.bin", revision),
        **{"licence": "apache-2.0", "bytes": n, "sha256": digest, "tokenizer": NEOX},
        arguments={"vocab_size": 50277, "residual_in_fp32": True},
        note="trained on 300 B tokens of the Pile",
    )
    for size, revision, n, digest in PILE
)
CATALOGUE += (
    Weights(
        "mamba_2.8b",
        Hub("state-spaces/mamba-2.8b-slimpj", "pytorch_model.bin", "0ac3b9882ed9da9990e95a7cdf8fdc6c73bc4107"),
        tag="slimpj",
        **{"licence": "apache-2.0", "bytes": 11_073_601_434, "tokenizer": NEOX},
        sha256="63d17331bd1f8412ec22dd4d05bd4d839b54817b711545b93d8410b180436221",
        arguments={"vocab_size": 50277, "residual_in_fp32": True},
        note="trained on 600 B tokens of SlimPajama",
    ),
    Weights(
        "transformerpp_2.7b",
        Hub("state-spaces/transformerpp-2.7b", "pytorch_model.bin", "15a431b71c40c284138c379d07d4008a28fea397"),
        tokenizer=NEOX,
        arguments={
            **{"vocab_size": 50277, "residual_in_fp32": True, "pad_vocab_size_multiple": 16},
            "attn_cfg": {"causal": True, "head_dim": 80, "num_heads": 32, "rotary_emb_dim": 40}
            | {"out_proj_bias": False, "qkv_proj_bias": False},
        },
        metric="zero shot: LAMBADA perplexity 3.99, accuracy 70.3 %; HellaSwag 66.4 %; PIQA 75.2 %",
    ),
)
