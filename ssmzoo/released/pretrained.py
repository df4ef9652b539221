"""A model of ours with the released weights of its preset."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor, nn

from ssmzoo.layers.roles import in_head
from ssmzoo.presets import build_preset
from ssmzoo.released.catalogue import Weights
from ssmzoo.released.download import fetch
from ssmzoo.released.family import find
from ssmzoo.released.files import read_state_dict
from ssmzoo.released.fit import compare, fit_state_dict, role


def build_pretrained(entry: Weights, **overrides: Any) -> nn.Module:
    """The preset of an entry with its released weights, fetched if need be; `overrides` replace constructor arguments.

    A classifier for another number of classes keeps its new head, with a warning that says so; 0 classes: no head.
    Raises DownloadError, and CheckpointError where the weights do not fit what was asked for.
    """
    model = build_preset(entry.preset, **(dict(entry.model) | overrides))
    load_pretrained(model, entry, replace_head="num_classes" in overrides)
    return model


def load_pretrained(model: nn.Module, entry: Weights, replace_head: bool = False) -> None:
    """Copy the released weights into a model; strict, but for the head where that may be replaced."""
    state = released_state(model, entry)
    if replace_head:
        state |= new_head(model, state, entry.name)
        own = model.state_dict()
        state = {k: v for k, v in state.items() if k in own or not in_head(k.rpartition(".")[0])}
    fit_state_dict(model, state, what=f"{entry.name} as asked for", family=entry.family)


def released_state(model: nn.Module, entry: Weights) -> dict[str, Tensor]:
    """The released tensors of an entry under the names of a model of ours."""
    state = read_state_dict(fetch(entry), entry.wrappers)
    convert = find(entry.family, "from_official")
    return convert(model, state) if convert else state


def new_head(model: nn.Module, state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The model's own tensors for a head of another shape than the file's, said in a warning; {} when it fits."""
    own = model.state_dict()
    reshaped = [k for k in compare(model, state).reshaped if role(model, k) == "head"]
    if not reshaped:
        return {}
    there, here = len(state[reshaped[0]]), len(own[reshaped[0]])
    warnings.warn(
        f"{name}: the file has {there} classes, the model {here}: its head ({', '.join(reshaped)}) starts from random "
        f"values and needs training",
        stacklevel=4,
    )
    return {k: own[k] for k in reshaped}
