"""`load_official`: the official model of a family, from a checkpoint in the official naming."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

from torch import Tensor, nn

from ssmzoo.released.family import families, find, looks_like
from ssmzoo.released.files import CheckpointError, read_state_dict
from ssmzoo.suggest import nearest


def load_official(family: str, checkpoint, **official_kwargs) -> nn.Module:
    """Build the official model of `family` from a checkpoint in the official naming, in eval mode.

    checkpoint       a path (.pth .pt .bin .safetensors, or a folder, whose config.json adds constructor arguments) or a
                     state dict
    official_kwargs  the official class's own constructor arguments
    returns          our module; its forward takes the official inputs in order and returns the official outputs

    Raises ValueError for an unknown family, TypeError for an unknown argument, CheckpointError for a checkpoint that
    is damaged or does not fit.
    """
    hook = find(family, "official")
    if hook is None:
        known = families("official")
        raise ValueError(f"unknown family {family!r}{nearest(family, known)}; known: {', '.join(known)}")
    parameters = inspect.signature(hook).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for key in official_kwargs:
        if not open_ended and key not in parameters:
            raise TypeError(f"{family} takes no argument {key!r}{nearest(key, parameters)}")
    if isinstance(checkpoint, (str, Path)):
        config = Path(checkpoint) / "config.json"
        if config.is_file():
            from_file = json.loads(config.read_text())
            official_kwargs = {k: v for k, v in from_file.items() if open_ended or k in parameters} | official_kwargs
        checkpoint = read_state_dict(checkpoint)
    try:
        module, state = hook(dict(checkpoint), **official_kwargs)
    except KeyError as error:
        raise CheckpointError(
            f"the checkpoint has no {error}: is it one of family {family!r}?{looks_like(checkpoint)}"
        ) from None
    except (IndexError, RuntimeError) as error:  # a tensor of another shape than the key map expects
        raise CheckpointError(
            f"the checkpoint does not fit the official {family} model ({error}){looks_like(checkpoint)}"
        ) from error
    fit_state_dict(module, state, what=f"the official {family} model")
    return module.eval()


def fit_state_dict(module: nn.Module, state: dict[str, Tensor], what: str = "the model") -> None:
    """Load `state` strictly; raise CheckpointError listing missing and unexpected keys and wrong shapes."""
    own = module.state_dict()
    state = {key.replace("_orig_mod.", ""): value for key, value in state.items()}
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    wrong = [
        f"{k}: {tuple(state[k].shape)} in the checkpoint, {tuple(v.shape)} in the model"
        for k, v in own.items()
        if k in state and state[k].shape != v.shape
    ]
    problems = [
        f"{name} {len(keys)}: {', '.join(keys[:6])}{' ...' if len(keys) > 6 else ''}"
        for name, keys in (("missing keys", missing), ("unexpected keys", extra), ("wrong shapes", wrong))
        if keys
    ]
    if problems:
        raise CheckpointError(f"the checkpoint does not fit {what}; " + "; ".join(problems) + looks_like(state))
    module.load_state_dict(state)
