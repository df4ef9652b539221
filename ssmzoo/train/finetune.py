"""Fine-tuning: which parameters stand still, LoRA, and the tokenizer that belongs to the weights."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ssmzoo.adapt.lora import add_lora
from ssmzoo.checkpoint_files import MANIFEST, find_checkpoint, read_manifest
from ssmzoo.released.catalogue import find_weights
from ssmzoo.released.download import fetch_tokenizer
from ssmzoo.released.fit import role
from ssmzoo.suggest import check_slot, nearest
from ssmzoo.train.stages import stage_of

PROBE = "all_but_head"
KEYS = ("rank", "alpha", "targets")


def prepare(model: nn.Module, freeze: Any = None, lora: dict | None = None) -> str:
    """Freeze parameters and put LoRA on, in place; returns a sentence on what is trained, '' when everything is."""
    if freeze is None and not lora:
        return ""
    said = []
    if lora:
        check_slot("lora", lora, KEYS, "lora")
        layers = add_lora(model, **lora)
        said.append(f"LoRA of rank {lora.get('rank', 8)} on {len(layers)} layers")
    if freeze is not None:
        names = frozen_names(model, freeze)
        for name, parameter in model.named_parameters():
            if name in names:
                parameter.requires_grad_(False)
        said.append(f"freeze={freeze}")
    keep_statistics(model)
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    trained, total = sum(n for n, on in counts if on), sum(n for n, _ in counts)
    if not trained:
        raise ValueError(f"freeze={freeze}: nothing is left to train")
    return f"{', '.join(said)}: {trained:,} of {total:,} parameters are trained"


def frozen_names(model: nn.Module, freeze: int | str | Sequence[str]) -> set[str]:
    """Names of the parameters that stand still.

    n             the embedding or stem and the first n stages (blocks, where there are no stages)
    all_but_head  a linear probe
    glob(s)       of parameters or modules: "layers.0", "*.in_proj.*"
    """
    names = [name for name, _ in model.named_parameters()]
    if isinstance(freeze, bool) or freeze == []:
        raise ValueError(f"freeze is {freeze!r}; give a number of stages, {PROBE}, or globs of names")
    if isinstance(freeze, int):
        stages = {name: stage_of(model, name) for name in names}
        count = 1 + max((s for s in stages.values() if s is not None), default=-1)
        if not 0 <= freeze <= count:
            raise ValueError(f"freeze is {freeze}; {type(model).__name__} has {count} stages or blocks")
        return {name for name, stage in stages.items() if stage is not None and stage < freeze}
    if freeze == PROBE:
        heads = {name for name in names if role(model, name) == "head"}
        if not heads:
            raise ValueError(f"freeze={PROBE}: {type(model).__name__} has no head of its own")
        return set(names) - heads
    found: set[str] = set()
    for pattern in [freeze] if isinstance(freeze, str) else freeze:
        fits = fnmatch.filter(names, pattern) or fnmatch.filter(names, f"{pattern}.*")
        if not fits:
            modules = [name for name, _ in model.named_modules() if name]
            raise ValueError(f"freeze: no parameter or module is called {pattern!r}{nearest(pattern, names + modules)}")
        found.update(fits)
    return found


def keep_statistics(model: nn.Module) -> None:
    """Batch norms whose parameters are all frozen also keep their running statistics."""
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if (
            isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d))
            and own
            and not any(p.requires_grad for p in own)
        ):
            module.register_forward_pre_hook(lambda norm, args: norm.eval() and None)


def tokenizer_of(init_from: str | None, model_name: str, pretrained: bool | str | None) -> str | None:
    """What data.tokenizer has to be for weights to keep their meaning; None where the weights bring no tokenizer."""
    if pretrained:
        repository = find_weights(model_name, pretrained).tokenizer
        return str(fetch_tokenizer(repository)) if repository else None
    if not init_from or not Path(init_from).expanduser().is_dir():
        return None
    try:
        folder = find_checkpoint(init_from)
        kind = read_manifest(folder).get("tokenizer", {}).get("type")
    except ValueError:  # a released folder; what is wrong with it is said where its weights are read
        return None
    return {"bytes": "bytes", "json": str(folder / MANIFEST)}.get(kind)
