"""Stand between models and the operators they call, without an `if` inside any model.

Layers look their operators up in the module they are written in (`from ssmzoo.ops import selective_scan_fn`). Within
`operators(model, selective_scan_fn=mine)` every such name means `mine`, which receives the real operator first and the
layer's own arguments behind it. The exchange holds for the process, not for one thread, like a choice of backend.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

from torch import nn

from ssmzoo import ops

JOINED = ("cross_selective_scan", "spatial_scan")


def in_parts(joined: Callable, *args, **kwargs):
    """A joined operator by the operators that it joins, which are called in its own module."""
    return joined.backends["torch"].function(*args, **kwargs)


@contextlib.contextmanager
def operators(model: nn.Module, **replacements: Callable) -> Iterator[None]:
    """Within the block, `name=function` serves the operator `name`: function(operator, *args, **kwargs).

    Reached are the modules of ssmzoo's layers and models and those in which the classes of `model` are written. The
    operators that join others (JOINED) run on their torch backend, which calls those one after another, so that they
    can be replaced too.
    """
    replacements = dict.fromkeys(JOINED, in_parts) | replacements
    homes = {c.__module__ for m in model.modules() for c in type(m).__mro__}
    homes |= {f"ssmzoo.ops.{name}" for name in JOINED}
    homes |= {name for name in sys.modules if name.startswith(("ssmzoo.layers.", "ssmzoo.models."))}
    homes = [sys.modules[name] for name in homes if name in sys.modules and not name.startswith("torch.")]
    with contextlib.ExitStack() as stack:
        for name, function in replacements.items():
            original = getattr(ops, name)
            for home in homes:
                for alias, value in list(vars(home).items()):
                    if value is original:
                        stack.enter_context(exchanged(home, alias, function))
        yield


@contextlib.contextmanager
def exchanged(owner, name: str, function: Callable) -> Iterator[None]:
    """Within the block, `owner.name` (a function of a module, a method of a class) is served by `function`, which
    receives the original first."""
    original = getattr(owner, name)

    def serve(*args, **kwargs):
        return function(original, *args, **kwargs)

    setattr(owner, name, serve)
    try:
        yield
    finally:
        setattr(owner, name, original)


class Whereabouts:
    """The innermost module of a model whose forward is running: `with Whereabouts(model) as at: ... at.name`."""

    def __init__(self, model: nn.Module):
        self.model, self.path, self.hooks = model, [], []

    def __enter__(self) -> Whereabouts:
        for name, module in self.model.named_modules():
            self.hooks.append(module.register_forward_pre_hook(lambda m, x, name=name: self.path.append((name, m))))
            self.hooks.append(module.register_forward_hook(lambda m, x, y: self.path.pop() and None, always_call=True))
        return self

    def __exit__(self, *error) -> None:
        for hook in self.hooks:
            hook.remove()
        self.hooks, self.path = [], []

    @property
    def name(self) -> str:
        return self.path[-1][0] if self.path else ""

    @property
    def module(self) -> nn.Module:
        return self.path[-1][1] if self.path else self.model

    def around(self, depth: int = 1) -> tuple[str, nn.Module]:
        """Name and module whose forward called the present one (depth 1), or the caller's caller (2), ..."""
        return self.path[-1 - depth] if len(self.path) > depth else ("", self.model)
