"""The module of a model whose forward is running, for whoever watches operators: they know no module."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

from torch import nn

from ssmzoo.layers.plain import observer


@dataclass
class Call:
    """One running forward: module and its name in the model; notes are the observer's own and end with the call."""

    name: str
    module: nn.Module
    notes: dict = field(default_factory=dict)


class ModuleTracker:
    """`with ModuleTracker(model) as modules: ... modules.current.name` is the innermost module at work.

    calls  the running forwards, from the model itself to the innermost one

    Layers of torch itself (Linear, Conv1d, ...) are passed over: none of them calls an operator. The hooks are marked
    as observers, so that the model takes the same fused operators as without them.
    """

    def __init__(self, model: nn.Module):
        self.model, self.calls, self.hooks = model, [Call("", model)], []

    def __enter__(self) -> ModuleTracker:
        for name, module in own_modules(self.model):
            enter, leave = observer(partial(self._enter, name)), observer(partial(self._leave))
            self.hooks.append(module.register_forward_pre_hook(enter))
            self.hooks.append(module.register_forward_hook(leave, always_call=True))
        return self

    def __exit__(self, *error) -> None:
        for hook in self.hooks:
            hook.remove()
        self.calls, self.hooks = self.calls[:1], []

    def _enter(self, name: str, module: nn.Module, inputs: tuple) -> None:
        self.calls.append(Call(name, module))

    def _leave(self, module: nn.Module, inputs: tuple, output) -> None:
        self.calls.pop()

    @property
    def current(self) -> Call:
        return self.calls[-1]

    @property
    def caller(self) -> Call:
        """The forward that called the current one."""
        return self.calls[max(0, len(self.calls) - 2)]


def own_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules of a model but for torch's layers without children."""
    for name, module in model.named_modules():
        if not type(module).__module__.startswith("torch.nn.") or next(module.children(), None) is not None:
            yield name, module
