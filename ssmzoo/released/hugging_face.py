"""What the models of Hugging Face transformers share: the fields of their configs, and their config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ssmzoo.released.arguments import INITIAL, KERNEL, Arguments
from ssmzoo.released.infer import count, part, ratio
from ssmzoo.released.language import HF, HiddenStates, is_tied, with_head
from ssmzoo.released.names import add_prefix, cut_prefix

TOKENS = "a token's number; the model computes the same"
INERT = {
    "initializer_range": (0.1, INITIAL),
    "rescale_prenorm_residual": (False, INITIAL),
    "use_cache": (True, "whether transformers keeps the state between calls"),
}


def official_hf_lm(cls, state: dict, config: dict[str, Any], mixer: dict[str, Any], tied: bool):
    """Fields that the configs share -> (our language model, state under our names).

    tied  whether the class ties the head where the config is silent. A file without the prefix `backbone.` is the
          backbone alone, what AutoModel saves: its outputs are the hidden states.
    """
    if config["hidden_act"] not in ("silu", "swish"):
        raise ValueError(f"hidden_act must be 'silu', as in all released checkpoints; got {config['hidden_act']!r}")
    alone = "embeddings.weight" in state
    state = HF.to_ours(add_prefix("backbone.", state) if alone else state)
    tied = alone or is_tied(state, config["tie_word_embeddings"], "tie_word_embeddings", tied)
    model = cls(
        config["vocab_size"],
        config["hidden_size"],
        config["num_hidden_layers"],
        ssm_cfg=mixer,
        norm_eps=config["layer_norm_epsilon"],
        residual_in_fp32=config["residual_in_fp32"],
        tie_embeddings=tied,
        pad_vocab_size_multiple=1,
    )
    return (HiddenStates(model), state) if alone else (model, with_head(state, tied))


def infer_hf(state: dict[str, Tensor], mixer) -> dict[str, Any]:
    """The shared fields that the tensors tell; `mixer(state of one mixer, hidden_size)` tells the others."""
    at = "backbone." if "backbone.embeddings.weight" in state else ""
    if f"{at}embeddings.weight" not in state:
        return {}
    rows, d = state[f"{at}embeddings.weight"].shape
    inferred = {"vocab_size": rows, "hidden_size": d, "num_hidden_layers": count(state, f"{at}layers.#.")}
    return inferred | mixer(part(state, f"{at}layers.0.mixer."), d)


def to_hf(module: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' names; a head that is the embedding is not written there, nor a prefix before a backbone alone."""
    if isinstance(module, HiddenStates):
        return cut_prefix("backbone.", HF.to_theirs(state))
    tied = module.lm_head.weight is module.backbone.embedding.weight
    return HF.to_theirs({key: value for key, value in state.items() if not (tied and key == "lm_head.weight")})


MAMBA = Arguments(
    "MambaForCausalLM",
    {
        **{"vocab_size": 50280, "hidden_size": 768, "state_size": 16, "num_hidden_layers": 32},
        **{"layer_norm_epsilon": 1e-5, "expand": 2, "conv_kernel": 4, "use_bias": False, "use_conv_bias": True},
        **{"hidden_act": "silu", "residual_in_fp32": True, "time_step_rank": "auto", "intermediate_size": None},
        **{"tie_word_embeddings": None},
    },
    INERT
    | {
        **{"pad_token_id": (0, TOKENS), "bos_token_id": (0, TOKENS), "eos_token_id": (0, TOKENS)},
        **{"time_step_scale": (1.0, INITIAL), "time_step_min": (0.001, INITIAL), "time_step_max": (0.1, INITIAL)},
        **{"time_step_init_scheme": ("random", INITIAL), "time_step_floor": (1e-4, INITIAL)},
        **{"use_mambapy": (False, KERNEL), "use_associative_scan": (True, KERNEL)},
    },
)


def mamba_mixer(config: dict[str, Any]) -> dict[str, Any]:
    """Arguments of our mixer for the fields of MambaConfig."""
    wide = config["intermediate_size"]
    return {
        "d_state": config["state_size"],
        "d_conv": config["conv_kernel"],
        "expand": config["expand"] if wide is None else (wide + 0.5) / config["hidden_size"],
        "dt_rank": config["time_step_rank"],
        "bias": config["use_bias"],
        "conv_bias": config["use_conv_bias"],
    }


def infer_mamba(state: dict[str, Tensor], given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of MambaConfig that the tensors tell."""
    return infer_hf(state, _mixer)


def _mixer(state: dict[str, Tensor], d: int) -> dict[str, Any]:
    e, n = state["A_log"].shape
    return {
        **{"state_size": n, "intermediate_size": e, "conv_kernel": state["conv1d.weight"].shape[-1]},
        **{"time_step_rank": state["dt_proj.weight"].shape[1], "expand": ratio(e, d)},
        **{"use_bias": "in_proj.bias" in state, "use_conv_bias": "conv1d.bias" in state},
    }
