"""A quantised model's form as plain JSON, and the form again from a fresh float model.

`structure(model)` lists every module that differs from the class's own, parents first:
[name, kind, arguments]. `restructure` replaces them in a model of the same configuration, with empty integers; weights
are loaded afterwards. Only the kinds below are built, in the sizes that the model has there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ssmzoo.layers.feedforward.moe import Experts
from ssmzoo.layers.feedforward.router import Router
from ssmzoo.layers.hadamard import CentredNorm, Rotated
from ssmzoo.layers.quantized import QuantizedConv1d, QuantizedEmbedding, QuantizedLinear, SeparateExperts

FORMAT = 1
LAYERS = {
    "linear": QuantizedLinear,
    "embedding": QuantizedEmbedding,
    "conv1d": QuantizedConv1d,
    "experts": SeparateExperts,
}
SIZES = {
    "linear": ("in_features", "out_features"),
    "embedding": ("num_embeddings", "embedding_dim"),
    "conv1d": ("out_channels",),
}


def structure(model: nn.Module) -> list[list[Any]]:
    """[name, kind, arguments] of the modules that were replaced."""
    kinds = {cls: kind for kind, cls in LAYERS.items()}
    found: list[list[Any]] = []
    for name, module in model.named_modules():
        if type(module) in kinds:
            found.append([name, kinds[type(module)], module.settings()])
        elif isinstance(module, CentredNorm):
            found.append([name, "centred_norm", {"dim": module.dim, "eps": module.eps}])
        elif isinstance(module, Rotated):
            found.append([name, "rotated", {}])
        elif isinstance(module, Router) and module.gate_bias is not None:
            found.append([name, "router_bias", {}])
        elif getattr(module, "added_bias", False):
            found.append([name, "linear_bias", {}])
    return found


def restructure(model: nn.Module, section: dict[str, Any]) -> nn.Module:
    """Give a fresh model the form of a manifest's section "quantisation", in place. ValueError for other forms."""
    if not isinstance(section, dict) or section.get("format") != FORMAT or not isinstance(section.get("modules"), list):
        raise ValueError(f"the section 'quantisation' is no form that this version knows (format {FORMAT})")
    for entry in section["modules"]:
        try:
            name, kind, arguments = entry
            old = model.get_submodule(name)
            model.set_submodule(name, _built(old, kind, dict(arguments)).train(old.training))
        except (ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise ValueError(f"the section 'quantisation' does not fit the model at {entry!r:.120}: {error}") from None
    shared = section.get("tied")
    if shared:
        embedding, head = (model.get_submodule(name) for name in shared)
        embedding.weight, embedding.scale = head.weight, head.scale
    return model


def _built(old: nn.Module, kind: str, arguments: dict[str, Any]) -> nn.Module:
    if kind == "rotated":
        return Rotated(old)
    if kind == "router_bias" and isinstance(old, Router):
        old.gate_bias = nn.Parameter(torch.zeros(old.n_experts))
        return old
    if kind == "linear_bias" and isinstance(old, nn.Linear):
        old.bias = nn.Parameter(torch.zeros(old.out_features))
        return old
    if kind == "centred_norm":
        expect(arguments["dim"], old.normalized_shape[0], "dim")
        return CentredNorm(**arguments)
    if kind == "experts" and isinstance(old, Experts):
        n, d, f = old.lin1_weight.shape
        out = f if old.activation is None else old.lin2_weight.shape[2]
        for name, size in zip(("n_experts", "d_model", "d_expert", "d_output"), (n, d, f, out)):
            expect(arguments[name], size, name)
        return SeparateExperts(**arguments)
    if kind not in LAYERS:
        raise ValueError(f"unknown kind {kind!r}")
    for name in SIZES[kind]:
        expect(arguments["channels" if name == "out_channels" else name], getattr(old, name), name)
    if kind == "conv1d":
        expect(arguments["kernel_size"], old.kernel_size[0], "kernel_size")
    return LAYERS[kind](**arguments)


def expect(given: Any, size: int, name: str) -> None:
    if given != size:
        raise ValueError(f"{name} is {given}, the model has {size}")
