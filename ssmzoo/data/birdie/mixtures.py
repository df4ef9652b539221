"""Which objectives with which numbers a mixture draws from, and how often.

    birdie          16 configurations of all eight kinds, after the released list; their weights are the task's to move
    fixed           the same with weights that stay
    ul2             what the paper compares with: next token, prefix and two infillings, weighted
    ul2_denoisers   the six infillings and the prefix objective of UL2
    next_token      next-token prediction alone

Sources: Blouir et al. 2024 (arXiv 2411.01030), section 3.2 and appendix A; Tay et al. 2023 (arXiv 2205.05131) for UL2.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ssmzoo.data.birdie.objectives import OBJECTIVES, Sample
from ssmzoo.suggest import nearest

TELLING = ("rate", "span", "fraction", "query_first")  # numbers that names show
GIVEN = ("tokens", "space", "rng", "encode")  # arguments of an objective that are not its numbers


class Configuration:
    """An objective with its numbers. kind: its class for the rewards; name: tells it from the others of a mixture."""

    def __init__(self, objective: str, weight: float = 1.0, **numbers: Any):
        if objective not in OBJECTIVES:
            raise ValueError(
                f"data.objectives: '{objective}' is unknown{nearest(str(objective), OBJECTIVES)}; "
                f"choose from {', '.join(OBJECTIVES)}"
            )
        function = OBJECTIVES[objective]
        known = [name for name in inspect.signature(function).parameters if name not in GIVEN]
        for name in numbers:
            if name not in known:
                raise ValueError(
                    f"data.objectives: {objective} has no {name}{nearest(name, known)}; it takes {', '.join(known)}"
                )
        _check_numbers(objective, weight, numbers)
        self.weight, self.numbers = float(weight), numbers
        self.kind = objective + "_deshuffling" * bool(numbers.get("shuffle"))
        given = [k if isinstance(v, bool) else f"{v:g}" for k, v in numbers.items() if v and k in TELLING]
        self.name = "_".join([self.kind, *given])
        self.make: Callable[..., Sample | None] = functools.partial(function, **numbers)


def _check_numbers(objective: str, weight: float, numbers: Mapping[str, Any]) -> None:
    limits = {"rate": (0, 1), "fraction": (0, 1), "span": (1, None), "max_spans": (1, None)}
    for key, value in ({"weight": weight} | dict(numbers)).items():
        low, high = limits.get(key, (0, None))
        if key in (*limits, "weight") and (value is not None):
            if not isinstance(value, (int, float)) or value < low or (high is not None and value > high):
                wanted = f"between {low} and {high}" if high is not None else f"at least {low}"
                raise ValueError(f"data.objectives: {objective} has {key} = {value}; it must be {wanted}")
        if key in ("before", "after") and not (len(value) == 2 and 1 <= value[0] <= value[1]):
            raise ValueError(
                f"data.objectives: {objective} has {key} = {list(value)}; give [least, most] lengths, at least 1"
            )


def _birdie() -> list[Configuration]:
    copies = [
        Configuration("selective_copying", span=span, query_first=first, max_spans=4)
        for span in (8, 16)
        for first in (True, False)
    ]
    return [
        Configuration("next_token"),
        Configuration("prefix_lm", fraction=0.75),
        *(Configuration("infilling", rate=rate, span=span) for rate in (0.15, 0.5) for span in (3, 8)),
        Configuration("autoencoding", rate=0.15, span=8),
        Configuration("autoencoding", rate=0.5, span=8),
        Configuration("autoencoding", rate=0.5, span=8, shuffle=True),
        Configuration("copying"),
        Configuration("deshuffling", rate=0.5),
        Configuration("deshuffling", rate=1.0),
        *copies,
    ]


def _ul2() -> list[Configuration]:
    return [
        Configuration("next_token", 0.6),
        Configuration("prefix_lm", 0.2, fraction=0.75),
        Configuration("infilling", 0.1, rate=0.15, span=3),
        Configuration("infilling", 0.1, rate=0.5, span=32),
    ]


def _denoisers() -> list[Configuration]:
    spans = ((0.15, 3), (0.15, 8), (0.15, 64), (0.5, 3), (0.5, 8), (0.5, 64))
    return [*(Configuration("infilling", rate=r, span=s) for r, s in spans), Configuration("prefix_lm", fraction=0.75)]


MIXTURES: dict[str, Callable[[], list[Configuration]]] = {
    "birdie": _birdie,
    "fixed": _birdie,
    "ul2": _ul2,
    "ul2_denoisers": _denoisers,
    "next_token": lambda: [Configuration("next_token")],
}


def configurations(mixture: str, objectives: Sequence[Mapping[str, Any]] | None) -> list[Configuration]:
    """Those of a mixture, or the given ones in their place. Raises ValueError for what is unknown or out of range."""
    if mixture not in MIXTURES:
        raise ValueError(
            f"data.mixture = '{mixture}'{nearest(str(mixture), MIXTURES)}; choose one of {', '.join(MIXTURES)}"
        )
    if objectives is None:
        return MIXTURES[mixture]()
    if mixture not in ("birdie", "fixed"):
        raise ValueError(f"data.objectives goes with data.mixture=birdie or fixed; {mixture} has its own")
    if any(not isinstance(given, Mapping) or "objective" not in given for given in objectives):
        raise ValueError("data.objectives is a list such as [{objective: infilling, rate: 0.15, span: 3, weight: 1}]")
    found = [Configuration(**given) for given in objectives]
    names = [c.name for c in found]
    if len(set(names)) < len(names) or not sum(c.weight for c in found):
        raise ValueError(f"data.objectives must differ from each other and have weights above 0, got {names}")
    return found
