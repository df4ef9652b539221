"""Mamba in the naming of Hugging Face transformers (Apache-2.0): MambaForCausalLM, and MambaModel without a head."""

from __future__ import annotations

from ssmzoo.models.mamba import MambaLM
from ssmzoo.released import language
from ssmzoo.released.catalogue import Hub, Weights
from ssmzoo.released.hugging_face import MAMBA, infer_mamba, mamba_mixer, official_hf_lm, to_hf
from ssmzoo.released.language import AttentionMask

MODEL_TYPE = "mamba"
MODELS = (MambaLM,)
TABLES = (MAMBA,)
TELLING_KEYS = (r"^(backbone\.)?embeddings\.weight", r"mixer\.x_proj\.weight")
infer, from_official, to_official, golden = infer_mamba, language.from_official, to_hf, language.golden_lm


def official(state: dict, **given):
    """The arguments are MambaConfig's. Without a head in the file the outputs are the last hidden states."""
    config = MAMBA.complete(given)
    return official_hf_lm(MambaHF, state, config, mamba_mixer(config), tied=True)


class MambaHF(AttentionMask, MambaLM):
    """Mamba with the inputs of transformers' MambaForCausalLM."""


CATALOGUE = tuple(
    Weights(
        f"mamba_{size}",
        Hub(f"state-spaces/mamba-{size}-hf", "model.safetensors", revision),
        tag="hf",
        licence="apache-2.0",
        tokenizer=f"state-spaces/mamba-{size}-hf",
        note="the same weights in transformers' naming",
    )
    for size, revision in (
        ("130m", "main"),
        ("370m", "14e4f0139736c06e3d2bef0ebce116cc6f371b11"),
        ("790m", "main"),
    )
)
