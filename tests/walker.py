"""Does every module's forward run? Wrap, hook and parametrise each leaf of a model, and look at what comes out.

    problems = check(model, passes)

`passes` are functions that run the model on the same input in different ways and return the same tensor: one pass, in
chunks, token by token, packed ... In eval mode and double precision.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from tried import tried

TOLERANCE, NOISE = 1e-6, 1e-10  # relative, in double precision: equal passes, no change at all


def leaves(model: nn.Module) -> list[str]:
    """Names of every Linear, convolution, embedding and norm."""
    return [
        name
        for name, m in model.named_modules()
        if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd, nn.Embedding, nn.LayerNorm))
        or (type(m).__name__.endswith(("Norm", "Norm2d")) and getattr(m, "weight", None) is not None)
    ]


def form(module: nn.Module) -> tuple:
    """Equal for modules of the same classes, shapes and settings."""
    plain = (bool, int, float, str, tuple, type(None))
    return tuple(
        (name, type(m), *((k, v) for k, v in vars(m).items() if isinstance(v, plain) and k != "layer_idx"))
        + tuple(p.shape for p in m.parameters(recurse=False))
        for name, m in module.named_modules()
    )


class Adapter(nn.Module):
    """What peft's layers are: the base's forward and a trained change; `.weight` and `.bias` are the frozen base's."""

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base
        width = base.weight.shape[1 if isinstance(base, nn.Embedding) else 0]
        gain = torch.linspace(-0.4, 0.5, width, dtype=base.weight.dtype)
        self.gain = nn.Parameter(gain[torch.randperm(width, generator=torch.Generator().manual_seed(3))])

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)

    def forward(self, *args, **kwargs) -> Tensor:
        return self.change(self.base(*args, **kwargs))

    def change(self, y: Tensor) -> Tensor:
        axis = 1 if isinstance(self.base, nn.modules.conv._ConvNd) or y.shape[-1] != len(self.gain) else -1
        shape = [1] * y.ndim
        shape[axis] = -1
        return y * (1 + self.gain.view(shape))


class Scaled(nn.Module):
    """A parametrisation: the rows of a weight, each by its own factor."""

    def __init__(self, weight: Tensor):
        super().__init__()
        factor = torch.linspace(0.5, 1.6, len(weight), dtype=weight.dtype)
        self.factor = nn.Parameter(factor.view(-1, *[1] * (weight.ndim - 1)))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.factor


@contextlib.contextmanager
def wrapped(model: nn.Module, name: str):
    adapter = Adapter(model.get_submodule(name))
    model.set_submodule(name, adapter)
    try:
        yield adapter.gain
    finally:
        model.set_submodule(name, adapter.base)


@contextlib.contextmanager
def hooked(model: nn.Module, name: str):
    adapter = Adapter(model.get_submodule(name))
    handle = adapter.base.register_forward_hook(lambda module, args, y: adapter.change(y))
    try:
        yield adapter.gain
    finally:
        handle.remove()


@contextlib.contextmanager
def parametrised(model: nn.Module, name: str):
    module = model.get_submodule(name)
    already = parametrize.is_parametrized(module, "weight")
    scaled = Scaled(module.weight.detach())
    parametrize.register_parametrization(module, "weight", scaled)
    try:
        yield scaled.factor
    finally:
        if already:
            module.parametrizations["weight"].pop(-1)
        else:
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)


CHANGES = (wrapped, hooked, parametrised)


def changes_of(model: nn.Module) -> dict[str, tuple]:
    """{leaf: what is done to it}: every change to one of the leaves that equal blocks and experts repeat, and at least
    one to each."""
    alike: dict[tuple, list[str]] = {}
    for name in leaves(model):
        parts = name.split(".")
        first = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
        block = model.get_submodule(".".join(parts[: first + 1]))
        alike.setdefault((re.sub(r"\d+", "", name), form(block)), []).append(name)
    found = {}
    for i, names in enumerate(alike.values()):
        for j, name in enumerate(names):
            found[name] = CHANGES if len(names) == 1 else CHANGES[:2] if j == i % len(names) else CHANGES[2:]
    return found


def check(model: nn.Module, passes: dict[str, Callable[[], Tensor]], every: bool = False) -> list[str]:
    """What is wrong with any leaf: a change that does not act, acts unequally in two passes, or gets no gradient.

    `every` change is done to every leaf, of equal blocks too.
    """
    plain = {kind: run().detach() for kind, run in passes.items()}
    changes = dict.fromkeys(leaves(model), CHANGES) if every else changes_of(model)
    return [problem for name in changes for problem in check_leaf(model, name, changes[name], passes, plain)]


def check_leaf(model: nn.Module, name: str, changes: tuple, passes: dict, plain: dict[str, Tensor]) -> list[str]:
    problems, seen = [], {}
    for change in changes:
        title = f"{name}, {change.__name__}"
        with change(model, name) as parameter:
            expected = gradient = None
            for kind, run in passes.items():
                y = run()
                tried("changes of a module, each in one kind of pass")
                if not (y - plain[kind]).norm() > NOISE * plain[kind].norm():
                    problems.append(f"{title}: does not act in {kind}")
                expected = y.detach() if expected is None else expected
                if not (y - expected).norm() <= TOLERANCE * expected.norm():
                    problems.append(f"{title}: {kind} differs from {next(iter(passes))}")
                if y.requires_grad:
                    (g,) = torch.autograd.grad(y.square().sum(), parameter, allow_unused=True)
                    gradient = g if gradient is None else gradient
                    if g is None or not g.norm() > 0 or not (g - gradient).norm() <= TOLERANCE * gradient.norm():
                        problems.append(f"{title}: gradient is {'missing' if g is None else 'another'} in {kind}")
            seen[change] = expected
    if wrapped in seen and not (seen[wrapped] - seen[hooked]).norm() <= TOLERANCE * seen[wrapped].norm():
        problems.append(f"{name}: a hook's output is not what a wrapper's is")
    return problems
