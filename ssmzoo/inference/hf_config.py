"""The zoo's language models as transformers stores them: fields of config.json and names of tensors, no transformers.

config.json          model_type "ssmzoo", target (class), arguments (of its constructor), sizes for other programs
model.safetensors    our names behind "model."; a tied tensor once
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ssmzoo.inference.hf_hidden import depth
from ssmzoo.layers.decoder import Decoder, LanguageModel
from ssmzoo.layers.quantized import QuantizedLinear

MODEL_TYPE, ARCHITECTURE, PREFIX = "ssmzoo", "ZooForCausalLM", "model."


def generic_config(model: nn.Module, node: dict[str, Any], quantisation: dict | None = None) -> dict[str, Any]:
    """config.json of a model and the node (`_target_` and arguments) that it was built from; quantisation: the section
    of its manifest, if it has one."""
    table = embedding(model)
    rows, width = head(model).out_features, 0
    if table is not None:
        rows, width = table.num_embeddings, table.embedding_dim
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "target": node["_target_"],
        "arguments": {key: value for key, value in node.items() if key != "_target_"},
        "vocab_size": rows,
        "hidden_size": width,
        "num_hidden_layers": depth(model),
        "tie_word_embeddings": bool(tied_names(model)),
    } | ({} if quantisation is None else {"quantisation": quantisation})


def generic_state(model: nn.Module) -> dict[str, Tensor]:
    """The tensors under the names of the wrapper, tied ones once."""
    left_out = tied_names(model)
    return {PREFIX + key: value for key, value in model.state_dict().items() if key not in left_out}


def tied_names(model: nn.Module) -> dict[str, str]:
    """{name: first name} of the parameters that are another one as well."""
    first: dict[int, str] = {}
    tied = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in first:
            tied[name] = first[id(parameter)]
        else:
            first[id(parameter)] = name
    return tied


def embedding(model: nn.Module) -> nn.Module | None:
    """The table of the vocabulary; None for a model that reads no ids."""
    decoder = next((m for m in model.modules() if isinstance(m, Decoder)), None)
    if decoder is not None:
        return decoder.embedding
    return next((m for m in model.modules() if isinstance(m, nn.Embedding)), None)


def head(model: nn.Module) -> nn.Module:
    """The layer that gives the logits: a language model names it, of another it is the last linear one."""
    if isinstance(model, LanguageModel):
        return getattr(model, model.head_name)
    return [m for m in model.modules() if isinstance(m, (nn.Linear, QuantizedLinear))][-1]
