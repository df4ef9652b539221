"""Falcon-Mamba in the naming of Hugging Face transformers (Apache-2.0): FalconMambaForCausalLM, and the model alone.

The tensors are those of mamba_hf: only config.json (model_type) distinguishes the two.
"""

from __future__ import annotations

from ssmzoo.models.falcon_mamba import FalconMambaLM
from ssmzoo.released import language
from ssmzoo.released.arguments import Arguments
from ssmzoo.released.catalogue import Hub, Weights
from ssmzoo.released.hugging_face import MAMBA, infer_mamba, mamba_mixer, official_hf_lm, to_hf
from ssmzoo.released.language import AttentionMask

MODEL_TYPE = "falcon_mamba"
MODELS = (FalconMambaLM,)
CONFIG = Arguments("FalconMambaForCausalLM", MAMBA.honoured | {"mixer_rms_eps": 1e-6}, MAMBA.inert)
TABLES = (CONFIG,)
infer, from_official, to_official, golden = infer_mamba, language.from_official, to_hf, language.golden_lm


def official(state: dict, **given):
    """The arguments are FalconMambaConfig's. Without a head in the file the outputs are the last hidden states."""
    config = CONFIG.complete(given)
    mixer = mamba_mixer(config) | {"mixer_rms_eps": config["mixer_rms_eps"]}
    return official_hf_lm(FalconMambaHF, state, config, mixer, tied=True)


class FalconMambaHF(AttentionMask, FalconMambaLM):
    """Falcon-Mamba with the inputs of transformers' FalconMambaForCausalLM."""


CATALOGUE = (
    Weights(
        "falcon_mamba_7b",
        Hub("tiiuae/falcon-mamba-7b", "model.safetensors.index.json", "080ad94b3619e2c2d0afa59bafdc6113465b7006"),
        **{"licence": "TII Falcon-Mamba License 2.0", "bytes": 14_545_401_832, "tokenizer": "tiiuae/falcon-mamba-7b"},
        note="16-bit weights in three shards",
    ),
)
