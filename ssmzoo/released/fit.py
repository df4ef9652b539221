"""Tensors into a model: all of them, or a refusal that says which do not fit."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ssmzoo.layers.roles import EMBEDDED, in_head, named_role
from ssmzoo.released.family import family_of, looks_like
from ssmzoo.released.files import CheckpointError


def fit_state_dict(
    module: nn.Module,
    state: dict[str, Tensor],
    what: str = "the model",
    family: str | None = None,
    assign: bool = False,
) -> None:
    """Load `state` strictly; raise CheckpointError listing missing and unexpected keys and wrong shapes.

    family  the one that was asked for: a hint that the file looks like it would help nobody
    assign  keep the tensors that were read, which may be mapped from a file, in place of copying them

    Tensors of another floating type become the module's, with a warning that names both.
    """
    state = {key.replace("_orig_mod.", ""): value for key, value in state.items()}
    check_fit(module, state, what, family)
    say_conversion(module.state_dict(), state, what)
    module.load_state_dict(state, assign=assign)


def check_fit(module: nn.Module, state: dict[str, Tensor], what: str, family: str | None = None) -> None:
    """CheckpointError unless `state` has the module's keys and shapes; nothing is loaded."""
    own = module.state_dict()
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
        hint = "" if family is not None and family_of(state) == family else looks_like(state)
        odd = [k for k, v in own.items() if k in state and state[k].shape != v.shape]
        heads = [len(state[k]) for k in odd if role(module, k) == "head"]
        if len(heads) == len(wrong) > 0 and not missing and not extra and hasattr(module, "num_classes"):
            hint = f"; the head of the file has {heads[0]} classes: build the model with num_classes={heads[0]}"
        raise CheckpointError(f"the checkpoint does not fit {what}; " + "; ".join(problems) + hint)


def say_conversion(own: dict[str, Tensor], state: dict[str, Tensor], what: str) -> None:
    """Warn when 16-bit tensors are about to become 32-bit ones, or the other way round."""
    pairs = {(state[k].dtype, v.dtype) for k, v in own.items() if k in state and v.is_floating_point()}
    for stored, wanted in sorted(pairs, key=str):
        if stored != wanted and stored.is_floating_point:
            names = [str(t).removeprefix("torch.") for t in (stored, wanted)]
            warnings.warn(
                f"{what}: the file stores {names[0]}, the model computes in {names[1]}; "
                f"model.to(torch.{names[0]}) takes it back",
                stacklevel=3,
            )


class Taken(NamedTuple):
    """What a model takes from a state: names that fit, names of other shapes, names that are not there."""

    fits: dict[str, Tensor]
    reshaped: list[str]
    absent: list[str]


def compare(model: nn.Module, state: dict[str, Tensor]) -> Taken:
    own = model.state_dict()
    fits = {k: v for k, v in state.items() if k in own and own[k].shape == v.shape}
    return Taken(fits, [k for k in own if k in state and k not in fits], [k for k in own if k not in state])


def role(model: nn.Module, name: str) -> str:
    """'embedding', 'head', 'norm' or '' for a parameter or buffer of a model."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if isinstance(module, nn.Embedding) or named_role(leaf) in EMBEDDED:
        return "embedding"
    if in_head(path):
        return "head"
    return "norm" if "Norm" in type(module).__name__ else ""


def share(model: nn.Module, names: list[str]) -> str:
    """'12.3 % of its parameters', of those that are trained or stored under these names."""
    own = model.state_dict()
    total = sum(v.numel() for v in own.values())
    return f"{100 * sum(own[k].numel() for k in names) / max(1, total):.1f} % of its parameters"


def same_head(state: dict[str, Tensor], head: str, embedding: str) -> bool:
    """Is the head of a checkpoint its embedding (or not stored)?"""
    return head not in state or (
        state[head].shape == state[embedding].shape and torch.equal(state[head], state[embedding])
    )


def refuse_other_constants(state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Tables that the model computes instead of storing may be in a file, if they are the same ones (to 16 bits).

    Those for another image size or length are not compared. Raises CheckpointError.
    """
    for key, value in state.items():
        there = expected.get(key)
        if there is None or value.shape[1:] != there.shape[1:]:
            raise CheckpointError(f"{key} {tuple(value.shape)} of the file has no parameter in the model")
        if len(value) == len(there) and not torch.allclose(value.detach().float(), there.float(), atol=1e-2):
            raise CheckpointError(f"{key} of the file is not the table that the model computes")
