"""The config.json that lies beside the weights of a folder, as constructor arguments."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ssmzoo.released.family import families, find
from ssmzoo.released.files import CheckpointError

LARGEST = 4 << 20  # bytes
# what transformers writes into every config.json, whatever the model: files, types, and defaults of text generation
NO_ARGUMENT = set(
    "architectures auto_map dtype torch_dtype transformers_version _name_or_path model_type tokenizer_class "
    "task_specific_params problem_type id2label label2id num_labels return_dict return_dict_in_generate output_scores "
    "output_attentions output_hidden_states use_bfloat16 tf_legacy_loss torchscript pruned_heads tie_encoder_decoder "
    "is_decoder is_encoder_decoder add_cross_attention cross_attention_hidden_size chunk_size_feed_forward prefix "
    "finetuning_task sep_token_id decoder_start_token_id max_length min_length do_sample early_stopping num_beams "
    "num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty "
    "no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences remove_invalid_values "
    "exponential_decay_length_penalty suppress_tokens begin_suppress_tokens forced_bos_token_id forced_eos_token_id "
    "attn_implementation _attn_implementation _attn_implementation_autoset rms_norm_eps".split()
) - {"rms_norm_eps"}


def read_config(folder: Path) -> dict[str, Any]:
    """The fields of a folder's config.json; {} without one. Infinity may stand there bare or as transformers 5 does."""
    path = folder / "config.json"
    if not path.is_file():
        return {}
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError(f"it has {path.stat().st_size:,} bytes")
        config = json.loads(path.read_text(encoding="utf-8"), object_hook=_numbers)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read (cut off or damaged?): {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return config


def _numbers(record: dict) -> Any:
    """{"__float__": "Infinity"} is how transformers 5 writes a number that JSON has not."""
    if list(record) == ["__float__"]:
        return float(record["__float__"])
    return record


def family_of_config(config: dict[str, Any]) -> str | None:
    """The family that a config.json names: by transformers' model_type, or by the layer of a MambaConfig.

    Raises CheckpointError for a model_type that no family has.
    """
    model_type = config.get("model_type")
    if model_type == "gpt2" and config.get("mixer"):
        return None  # a GPT-2 whose attention other mixers replace: the keys tell which
    if model_type is not None:
        known = {find(family, "MODEL_TYPE"): family for family in families("MODEL_TYPE")}
        if model_type not in known:
            named = ", ".join(map(str, config.get("architectures") or ())) or "no architectures"
            raise CheckpointError(
                f"config.json says model_type {model_type!r} ({named}), which is none of {', '.join(known)}"
            )
        return known[model_type]
    if "d_model" in config and "n_layer" in config:
        layer = str((config.get("ssm_cfg") or {}).get("layer", "Mamba1")).lower()
        return {"mamba1": "mamba"}.get(layer, layer)
    return None


def arguments_of(family: str, config: dict[str, Any], names: Collection[str] | None) -> dict[str, Any]:
    """The constructor arguments in a config.json, whose other fields must be ones without influence.

    names  those that the family takes, or None if that is not known. Raises CheckpointError.
    """
    owner = family_of_config(config)
    if owner is not None and owner != family:
        raise CheckpointError(f"config.json describes a model of family {owner!r}, not of {family!r}")
    if names is None or owner is None:
        return {key: value for key, value in config.items() if names is None or key in names}
    unknown = sorted(key for key in config.keys() - set(names) - NO_ARGUMENT if config[key] is not None)
    if unknown:
        raise CheckpointError(
            f"config.json sets {', '.join(unknown[:4])}, which family {family!r} does not know: {config[unknown[0]]!r}"
        )
    return {key: value for key, value in config.items() if key in names}
