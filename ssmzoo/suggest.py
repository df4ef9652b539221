"""The names nearest to a misspelt one, for error messages, and what is built from a dict of a user's."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def nearest(name: str, choices) -> str:
    """'; nearest: a, b' for an error message; empty when nothing is close. Of owner/name the name counts."""
    choices, name = list(dict.fromkeys(map(str, choices))), str(name).rpartition("/")[2]
    close = difflib.get_close_matches(name, choices, n=3, cutoff=0.6)
    if not close and len(name) > 2:  # a part of a longer name
        close = [c for c in choices if len(c) > 2 and (c.startswith(name) or name.startswith(c))][:3]
    return f"; nearest: {', '.join(close)}" if close else ""


def from_slot(slot: str, given: Mapping[str, Any] | None, called: Callable, *args: Any, **own: Any) -> Any:
    """called(*args, **own, **given), where `given` is the dict that a user gave as the argument `slot`; None: no more.

    Raises TypeError that names `slot` and the key when it is no argument of `called`, or one that its caller gives.
    """
    known = [name for name in argument_names(called)[len(args) :] if name not in own]
    check_slot(slot, given, [*known, *getattr(called, "old_arguments", ())], called.__name__, TypeError)
    return called(*args, **own, **(given or {}))


def check_slot(slot: str, given: Any, known: Sequence[str], taker: str, error: type[Exception] = ValueError) -> None:
    """Raise `error` unless `given`, which goes to `taker`, is a dict with keys out of `known`, or None."""
    if not isinstance(given or {}, Mapping):
        raise error(f"{slot} is {given!r}; expected arguments of {taker} by name")
    for key in given or {}:
        if key not in known:
            raise error(f"{slot}.{key} is unknown{nearest(key, known)}; {taker} takes {', '.join(known)}")


def argument_names(called: Callable) -> list[str]:
    """Of a function or constructor, in order. What a constructor takes as **keywords it passes on: to its base class,
    whose names are added, or to the class that is its attribute `Options`."""
    names = []
    for c in called.__mro__ if inspect.isclass(called) else (called,):
        if c is not called and "__init__" not in vars(c):
            continue
        parameters = inspect.signature(c).parameters.values()
        names += [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        if all(p.kind is not p.VAR_KEYWORD for p in parameters):
            break
        if (options := vars(c).get("Options")) is not None:
            names += argument_names(options)
            break
    return list(dict.fromkeys(names))
