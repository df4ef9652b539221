"""Constructor arguments of the last release that have moved: they keep working, with a warning, for one release."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

# (keywords given, value of the old one) writes the new keywords, or returns what is called with (module, value) instead
Move = Callable[[dict, object], Callable[[object, object], object] | None]


def old_arguments(**moves: Move) -> Callable[[type], type]:
    """Class decorator: `name=move` accepts the old keyword `name`, and `move(keywords, value)` writes the new one.

    The signature of the class shows the new arguments only; `cls.old_arguments` holds the names of the old ones for
    those who check keywords beforehand.
    """

    def decorate(cls: type) -> type:
        build = cls.__init__

        @functools.wraps(build)
        def __init__(self, *args, **kwargs):
            afterwards = []
            for name in [n for n in kwargs if n in moves]:
                value, before = kwargs.pop(name), dict(kwargs)
                action = moves[name](kwargs, value)
                new = [f"{k}={v!r}" for k, v in kwargs.items() if k not in before or before[k] is not v]
                if action is not None:
                    afterwards.append((action, value))
                    new.append(f"{action.__name__}(model, {value!r}) behind it")
                instead = ", ".join(new) or "nothing: it is the default"
                warnings.warn(
                    f"{cls.__name__}({name}={value!r}) will be refused by the next release; write {instead}",
                    DeprecationWarning,
                    stacklevel=2,
                )
            build(self, *args, **kwargs)
            for action, value in afterwards:
                action(self, value)

        cls.__init__, cls.old_arguments = __init__, frozenset(moves)
        return cls

    return decorate


def into(group: str, key: str) -> Move:
    """The old argument is `key` of the dict argument `group` now."""

    def move(keywords: dict, value: object) -> None:
        keywords[group] = {**(keywords.get(group) or {}), key: value}

    return move


def then(function: Callable[[object, object], object]) -> Move:
    """The old argument is what `function(module, value)` does to the module now; None did nothing."""
    return lambda keywords, value: None if value is None else function
