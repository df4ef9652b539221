"""The zoo's language models as transformers stores them: fields of config.json and names of tensors, no transformers.

config.json          model_type "ssmzoo", target (class), arguments (of its constructor), sizes for other programs
model.safetensors    our names behind "model."; a tied tensor once
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ssmzoo.layers.quantized import QuantizedLinear

MODEL_TYPE, ARCHITECTURE, PREFIX = "ssmzoo", "ZooForCausalLM", "model."


def generic_config(model: nn.Module, node: dict[str, Any], quantisation: dict | None = None) -> dict[str, Any]:
    """config.json of a model and the node (`_target_` and arguments) that it was built from; quantisation: the section
    of its manifest, if it has one."""
    embedding = next((m for m in model.modules() if isinstance(m, nn.Embedding)), None)
    rows, width = head(model).out_features, 0
    if embedding is not None:
        rows, width = embedding.num_embeddings, embedding.embedding_dim
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "target": node["_target_"],
        "arguments": {key: value for key, value in node.items() if key != "_target_"},
        "vocab_size": rows,
        "hidden_size": width,
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


def head(model: nn.Module) -> nn.Module:
    """The linear layer that gives the logits: the last one registered."""
    return [m for m in model.modules() if isinstance(m, (nn.Linear, QuantizedLinear))][-1]
