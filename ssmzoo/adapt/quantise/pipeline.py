"""All steps: separate experts -> reorder -> fuse norms, rotate (or smooth) -> scales -> weights, block by block.

GPTQ sees every layer with the blocks before it quantised already; embedding and head come last.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ssmzoo.adapt.quantise.clusters import Order
from ssmzoo.adapt.quantise.gptq import Hessian
from ssmzoo.adapt.quantise.norms import fuse_norms, untie
from ssmzoo.adapt.quantise.plan import Settings
from ssmzoo.adapt.quantise.points import Points, calibrate, points_of
from ssmzoo.adapt.quantise.reorder import mixers, reorder
from ssmzoo.adapt.quantise.replace import (
    codes_of,
    dynamic,
    linear_bits,
    put,
    quantised_conv,
    quantised_embedding,
    quantised_linear_layer,
    share,
)
from ssmzoo.adapt.quantise.rotation import rotate
from ssmzoo.adapt.quantise.smooth import smooth
from ssmzoo.adapt.quantise.structure import Skeleton, refuse_quantised, separate_experts, skeleton
from ssmzoo.adapt.quantise.tap import Taps
from ssmzoo.layers.decoder import LanguageModel
from ssmzoo.layers.quantized import SeparateExperts

LEAST_TOKENS = 512


@torch.no_grad()
def quantise(
    model: nn.Module, samples: Sequence[Tensor] = (), settings: Settings | None = None, **options: Any
) -> nn.Module:
    """A copy of a float model whose linear layers, embedding and head are small integers.

    samples    calibration text: token ids (l) each (for other models: batches of their inputs); needed for 8-bit
               activations, GPTQ, reordering and smoothing, and at least 512 tokens in all
    settings   see Settings; or its fields by name, quantise(model, samples, mode="w4a8")

    Models that are no language models are quantised by their linear layers alone, to nearest; rotate, reorder and
    GPTQ must be off. Raises ValueError for what does not fit, in words.
    """
    settings = Settings(**options) if settings is None else settings
    refuse_quantised(model)
    names = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    settings.check_layers(names)
    model = copy.deepcopy(model).eval().requires_grad_(False)
    separate_experts(model)
    wants = needs(model, settings)
    if wants:
        enough(samples, wants, isinstance(model, LanguageModel))
    orders = float_steps(model, samples, settings)
    points = calibrate(model, points_of(model, settings, orders), samples) if "8-bit activations" in wants else Points()
    if not isinstance(model, LanguageModel):
        put(model, layers_of(model, "", settings, points, {}))
        return model
    parts = skeleton(model)
    blocks(model, parts, samples if settings.method == "gptq" else (), settings, points)
    return model


def needs(model: nn.Module, settings: Settings) -> list[str]:
    """What asks for calibration text."""
    linear = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    four = any(linear_bits(name, m, settings) == 4 for name, m in linear)
    eight = any(settings.integer_activations(name) for name, _ in linear)
    why = ["8-bit activations"] if eight else []
    why += ["GPTQ"] if four and settings.method == "gptq" else []
    return why + (["smoothing"] if settings.smooth is not None else [])


def enough(samples: Sequence[Tensor], wants: list[str], text: bool) -> None:
    if not text and len(samples):
        return
    tokens = sum(s.numel() for s in samples) if text else 0
    if tokens < LEAST_TOKENS:
        raise ValueError(
            f"the calibration text has {tokens} tokens in {len(samples)} samples, too few for {' and '.join(wants)}; "
            f"give at least {LEAST_TOKENS}, better 100 times as many (or use a mode without: w8a16, or method nearest)"
        )


def float_steps(model: nn.Module, samples: Sequence[Tensor], settings: Settings) -> dict[str, Order]:
    """Everything that leaves the function as it is."""
    orders: dict[str, Order] = {}
    if settings.reorder:
        eight = [name for name in mixers(model) if settings.integer_activations(name)]
        orders = reorder(model, samples, eight) if eight else {}
    if settings.smooth is not None:
        smooth(model, samples, settings.smooth)
    if isinstance(model, LanguageModel) and (settings.untie or settings.embedding != settings.head):
        untie(model)
    if settings.rotate:
        fuse_norms(model)
        rotate(model)
    return orders


def layers_of(
    module: nn.Module, prefix: str, settings: Settings, points: Points, hessians: Mapping[str, Tensor]
) -> dict[str, nn.Module]:
    """The layers of integers for all linear layers and convolutions of mixers within a module, by their names."""
    made: dict[str, nn.Module] = {}
    experts = {id(m) for bank in module.modules() if isinstance(bank, SeparateExperts) for m in bank.modules()}
    for name, layer in module.named_modules(prefix=prefix):
        if isinstance(layer, nn.Linear):
            bits = linear_bits(name, layer, settings)
            codes = codes_of(layer.weight, bits, settings, hessians.get(name))
            made[name] = quantised_linear_layer(name, layer, codes, bits, points)
            if id(layer) in experts and settings.integer_activations(name):
                dynamic(made[name])
        elif isinstance(layer, nn.Conv1d) and name in points.outputs:
            made[name] = quantised_conv(name, layer, points)
    return made


def blocks(model: nn.Module, parts: Skeleton, samples: Sequence[Tensor], settings: Settings, points: Points) -> None:
    """Quantise block after block, then embedding and head; the samples (for GPTQ) go along."""
    streams = [parts.embedding(sample[None]) for sample in samples]
    for block in parts.blocks:
        name = parts.names[id(block)]
        found = hessians_of(block, name, settings, streams)
        put(model, layers_of(block, name, settings, points, found))
        streams = [block(x)[0] for x in streams]
    norm = model.get_submodule(parts.norm_name) if parts.norm_name else None
    streams = streams if norm is None else [norm(x) for x in streams]
    head_name, embedding_name = parts.names[id(parts.head)], parts.names[id(parts.embedding)]
    tied, made = parts.tied, {}
    if settings.head:
        found = hessians_of(parts.head, head_name, settings, streams)
        made |= layers_of(parts.head, head_name, settings, points, found)
    if settings.embedding:
        bits = 8 if settings.bits(embedding_name) == 8 or parts.embedding.embedding_dim % 2 else 4
        codes = codes_of(parts.embedding.weight, bits, settings)
        made[embedding_name] = quantised_embedding(parts.embedding, codes, bits)
        if tied and settings.head:
            share(made[embedding_name], made[head_name])
    put(model, made)


def hessians_of(module: nn.Module, prefix: str, settings: Settings, streams: Sequence[Tensor]) -> dict[str, Tensor]:
    """What the 4-bit linear layers within a module get to see while it is called with the streams."""
    found: dict[str, Hessian] = {}
    if not streams:
        return {}
    with Taps() as taps:
        for name, layer in module.named_modules(prefix=prefix):
            if isinstance(layer, nn.Linear) and linear_bits(name, layer, settings) == 4:
                found[name] = Hessian(layer.in_features)
                taps.inputs(layer, found[name].update)
        for x in streams if found else ():
            module(x)
    return {name: hessian.value for name, hessian in found.items()}
