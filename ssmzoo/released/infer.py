"""What the shapes of tensors say about the constructor's arguments, joined with what was given."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from ssmzoo.released.family import find
from ssmzoo.released.files import CheckpointError

# several values of these give the same shapes, so a given one need not be the one that is inferred
LOOSE = {"vocab_size", "d_intermediate", "expand", "mamba_expand", "mamba_expansion", "ssm_ratio", "mlp_ratio"}
LOOSE |= {"img_size", "imgsize"}


def join(family: str, state: Mapping[str, Tensor], given: Mapping[str, Any]) -> dict[str, Any]:
    """Given arguments, and for the others what the family's `infer(state, given)` tells.

    Raises CheckpointError where a given one contradicts the tensors.
    """
    infer = find(family, "infer")
    inferred = infer(state, given) if infer else {}
    wrong = [f"{key} is {value!r}, but the tensors say {there!r}" for key, value, there in _conflicts(given, inferred)]
    if wrong:
        raise CheckpointError(f"the checkpoint does not fit the official {family} model: " + "; ".join(wrong[:4]))
    merged = dict(inferred) | {key: value for key, value in given.items() if value is not None or key not in inferred}
    for key, value in inferred.items():
        if isinstance(value, dict):
            merged[key] = value | dict(given.get(key) or {})
    return merged


def _conflicts(given: Mapping[str, Any], inferred: Mapping[str, Any], at: str = ""):
    for key, there in inferred.items():
        value = given.get(key)
        if key in LOOSE or value is None or value == "auto":
            continue
        if isinstance(there, dict):
            yield from _conflicts(value, there, f"{key}.")
        elif not _agree(value, there):
            yield at + key, value, there


def _agree(value: Any, there: Any) -> bool:
    if isinstance(value, (list, tuple)) or isinstance(there, (list, tuple)):
        if not isinstance(value, (list, tuple)):  # one number for all stages, or for the first of doubling ones
            return list(there) in ([value] * len(there), [value * 2**i for i in range(len(there))])
        return list(value) == (list(there) if isinstance(there, (list, tuple)) else [there] * len(value))
    return value == there


def count(state: Iterable[str], pattern: str) -> int:
    """One more than the largest number that stands for `#` in a name that begins like the pattern; 0 without one."""
    expression = re.compile(re.escape(pattern).replace(r"\#", r"(\d+)"))
    numbers = [int(match[1]) for key in state if (match := expression.match(key))]
    return 1 + max(numbers, default=-1)


def ratio(inner: int, d: int) -> float:
    """A factor with int(factor * d) == inner: the plain quotient where rounding allows it."""
    for factor in (inner / d, (inner + 0.5) / d):
        if int(factor * d) == inner:
            return factor
    return (inner + 0.5) / d


def part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors of one module, under its own names."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
