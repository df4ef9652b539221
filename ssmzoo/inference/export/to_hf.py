"""A folder for Hugging Face transformers: its own class where it has one, else the zoo's (`import ssmzoo.hf`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from ssmzoo.inference.export.language import is_tied, transformers_config, why_no_mamba, why_not_transformers
from ssmzoo.inference.export.source import Source, family_of_class, save_tensors
from ssmzoo.inference.export.tokenizer import save_tokenizer, special_tokens
from ssmzoo.inference.hf_config import generic_config, generic_state, head
from ssmzoo.released.family import to_official


def refuse(source: Source) -> str | None:
    if source.kind != "language":
        return "transformers gets language models only"
    reason = why_not_native(source)
    if reason and source.node is None:
        return f"{reason}, and only a run records the constructor's arguments for the zoo's own class"
    return None


def why_not_native(source: Source) -> str | None:
    """Why a class of transformers itself does not read this model; None when one does."""
    if source.quantisation is not None:
        return "transformers has no layers of these integers"
    return why_no_mamba(source, "MODEL_TYPE") or why_not_transformers(source.model)


def write(source: Source, folder: Path) -> None:
    config, state = native(source) if why_not_native(source) is None else generic(source)
    tokens = special_tokens(source.tokenizer)
    save_tensors(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config | tokens, indent=2), encoding="utf-8")
    generation = {**tokens, "use_cache": True}
    if spare := spare_rows(source):
        generation["suppress_tokens"] = spare
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2), encoding="utf-8")
    save_tokenizer(source.tokenizer, folder)


def spare_rows(source: Source) -> list[int]:
    """Ids of the head that the tokenizer does not have: rows added to make the width a multiple."""
    if source.tokenizer is None:
        return []
    return list(range(source.tokenizer.vocab_size, head(source.model).out_features))


def native(source: Source) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config, tensors) of the class in transformers; Mamba-2 with its head also when it is tied, for sglang."""
    family = family_of_class(source.cls, "MODEL_TYPE")
    state = to_official(family, source.model)
    if family == "mamba2_hf" and is_tied(source.model):
        state["lm_head.weight"] = source.model.lm_head.weight
    return transformers_config(source), state


def generic(source: Source) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config, tensors) of the zoo's class, which stands in ssmzoo/inference/hf.py."""
    return generic_config(source.model, source.node, source.quantisation), generic_state(source.model)


def usage(source: Source) -> str:
    own = "" if why_not_native(source) is None else "import ssmzoo.hf  # registers the zoo's models\n"
    return (
        f"```python\n{own}from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        'model = AutoModelForCausalLM.from_pretrained("this/folder")\n'
        'tokenizer = AutoTokenizer.from_pretrained("this/folder")\n```\n'
    )
