"""Modules and functions that earlier releases had elsewhere: the old name finds the new one for one release."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable, Mapping
from importlib.abc import Loader, MetaPathFinder
from typing import Any

MODULES = {
    "ssmzoo.golden": "ssmzoo.released.golden",
    "ssmzoo.layers.attention": "ssmzoo.layers.mixers.attention",
    "ssmzoo.layers.complex_diagonal": "ssmzoo.models.complex_diagonal_ssm",
    "ssmzoo.layers.drop_path": "ssmzoo.layers.image.drop_path",
    "ssmzoo.layers.dsf": "ssmzoo.probes.dsf_layers",
    "ssmzoo.layers.heads": "ssmzoo.layers.decoder",
    "ssmzoo.layers.image_backbone": "ssmzoo.layers.image.backbone",
    "ssmzoo.layers.image_mlp": "ssmzoo.layers.image.mlp",
    "ssmzoo.layers.mamba": "ssmzoo.layers.mixers.mamba",
    "ssmzoo.layers.mamba2": "ssmzoo.layers.mixers.mamba2",
    "ssmzoo.layers.mamba3": "ssmzoo.models.mamba3",
    "ssmzoo.layers.mamba_vision": "ssmzoo.layers.image.mamba_vision",
    "ssmzoo.layers.mha": "ssmzoo.layers.mixers.attention",
    "ssmzoo.layers.mlp": "ssmzoo.layers.feedforward.mlp",
    "ssmzoo.layers.moe": "ssmzoo.layers.feedforward.moe",
    "ssmzoo.layers.patch_embed": "ssmzoo.layers.image.patch_embed",
    "ssmzoo.layers.plain_backbone": "ssmzoo.layers.image.plain_backbone",
    "ssmzoo.layers.restoration": "ssmzoo.layers.image.restoration",
    "ssmzoo.layers.router": "ssmzoo.layers.feedforward.router",
    "ssmzoo.layers.scenario": "ssmzoo.models.token_dynamics",
    "ssmzoo.layers.sd_ssm": "ssmzoo.models.sd_ssm",
    "ssmzoo.layers.soft_sort": "ssmzoo.models.token_dynamics",
    "ssmzoo.layers.ss2d": "ssmzoo.layers.image.ss2d",
    "ssmzoo.layers.stack": "ssmzoo.layers.decoder",
    "ssmzoo.layers.window_attention": "ssmzoo.layers.image.window_attention",
    "ssmzoo.models.free_a_ssm": "ssmzoo.probes.free_a_ssm",
    "ssmzoo.models.generation": "ssmzoo.inference.generate",
    "ssmzoo.models.mamba_reorder": "ssmzoo.models.token_dynamics",
    "ssmzoo.models.mamba_scenario": "ssmzoo.models.token_dynamics",
    "ssmzoo.official": "ssmzoo.released.load",
    "ssmzoo.tasks.restore_picture": "ssmzoo.inference.restore",
    "ssmzoo.tasks.tiling": "ssmzoo.inference.tiling",
}


class _Finder(MetaPathFinder, Loader):
    """Last in line: asked for names that no file has."""

    def find_spec(self, name, path=None, target=None):
        return importlib.util.spec_from_loader(name, self) if name in MODULES else None

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        old, new = module.__spec__.name, MODULES[module.__spec__.name]
        _warn(old, new)
        sys.modules[old] = importlib.import_module(new)


def names(module: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """The `__getattr__` of a module some of whose functions have another home now: {name: module}."""

    def __getattr__(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        _warn(f"{module}.{name}", f"{homes[name]}.{name}")
        return getattr(importlib.import_module(homes[name]), name)

    return __getattr__


def _warn(old: str, new: str) -> None:
    message = f"{old} is now {new}; the old name goes with the next release"
    warnings.warn(message, DeprecationWarning, stacklevel=3)


def install() -> None:
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
