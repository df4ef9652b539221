"""`load_official`: the official model of a family, from a checkpoint in the official naming."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ssmzoo.released.config_json import arguments_of, family_of_config, read_config
from ssmzoo.released.family import families, family_of, find, foreign, looks_like
from ssmzoo.released.files import WRAPPERS, CheckpointError, read_state_dict
from ssmzoo.released.fit import fit_state_dict
from ssmzoo.released.gguf import gguf_config
from ssmzoo.released.infer import join
from ssmzoo.suggest import nearest


def load_official(family, checkpoint=None, **official_kwargs) -> nn.Module:
    """Build an official model from a checkpoint in the official naming, in eval mode.

    family           the system's name; may be left out (`load_official(checkpoint)`): config.json or the keys tell it
    checkpoint       a path (.pth .pt .bin .safetensors .gguf, or a folder, whose config.json adds arguments) or a
                     state dict
    official_kwargs  the official class's own constructor arguments. What is left out is inferred from the tensors;
                     what they cannot tell takes the official class's default.
    returns          our module; its forward takes the official inputs in order and returns the official outputs

    Raises ValueError for an unknown family, TypeError for an unknown argument, CheckpointError for a checkpoint that
    is damaged or does not fit.
    """
    if checkpoint is None:
        family, checkpoint = None, family
    if family is not None and find(family, "official") is None:
        known = families("official")
        raise ValueError(f"unknown family {family!r}{nearest(family, known)}; known: {', '.join(known)}")
    if family is not None:
        check_names(family, official_kwargs)
    family, state, config = read(family, checkpoint)
    module, ours = build(family, state, arguments_of(family, config, argument_names(family)) | official_kwargs)
    fit_state_dict(module, ours, what=f"the official {family} model", family=family)
    return module.eval()


def read(family: str | None, checkpoint) -> tuple[str, dict[str, Tensor], dict[str, Any]]:
    """(family, tensors, fields of config.json) of a path or state dict."""
    if isinstance(checkpoint, Mapping):
        return family or recognise(checkpoint, {}), dict(checkpoint), {}
    if not isinstance(checkpoint, (str, Path)):
        raise TypeError(f"a checkpoint is a path or a state dict, got a {type(checkpoint).__name__}")
    path = Path(checkpoint).expanduser()
    config = gguf_config(path) if path.suffix == ".gguf" else read_config(path)
    if family is not None:
        return family, read_state_dict(checkpoint, find(family, "WRAPPERS") or WRAPPERS), config
    state = read_state_dict(checkpoint)
    family = recognise(state, config)
    wrappers = find(family, "WRAPPERS")
    return family, read_state_dict(checkpoint, wrappers) if wrappers else state, config


def recognise(state: Mapping[str, Tensor], config: dict[str, Any]) -> str:
    """The family of a checkpoint, by its config.json or its keys. Raises CheckpointError."""
    found = family_of_config(config) or family_of(state)
    if found is None:
        keys, guess = ", ".join(list(state)[:4]), foreign(state)
        raise CheckpointError(
            f"no family has keys like {keys}{guess and f'; {guess}'}; name one: "
            f"load_official(family, checkpoint) with family one of {', '.join(families('official'))}"
        )
    return found


def argument_names(family: str) -> list[str] | None:
    """Every argument that some official class of a family takes; None where that is not written down."""
    if tables := find(family, "TABLES"):
        return [name for table in tables for name in table.names]
    parameters = inspect.signature(find(family, "official")).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return None
    return [name for name in parameters if name != "state"]


def check_names(family: str, given: Mapping[str, Any]) -> None:
    """TypeError for an argument that no official class of the family takes, before any file is read."""
    names = argument_names(family)
    for key in given:
        if names is not None and key not in names:
            raise TypeError(f"{family} takes no argument {key!r}{nearest(key, names)}")


def build(family: str, state: Mapping[str, Tensor], given: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Tensor]]:
    """(module with the official inputs and outputs, the tensors under its names), nothing loaded yet."""
    try:
        return find(family, "official")(dict(state), **join(family, state, given))
    except KeyError as error:
        what = f"the checkpoint has no {error}: is it one of family {family!r}?"
        raise CheckpointError(what + hint(family, state)) from None
    except (IndexError, RuntimeError) as error:  # a tensor of another shape than the key map expects
        raise CheckpointError(
            f"the checkpoint does not fit the official {family} model ({error}){hint(family, state)}"
        ) from error


def hint(family: str, state: Mapping[str, Tensor]) -> str:
    """What the file looks like, if that is something else."""
    return "" if family_of(state) == family else looks_like(state)
