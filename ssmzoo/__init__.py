"""ssmzoo: a model zoo and trainer for Mamba and the other selective state-space models.

>>> import ssmzoo
>>> model = ssmzoo.create_model("mamba", vocab_size=256)
>>> ssmzoo.list_models("*mamba*", task="language")
>>> official = ssmzoo.load_official("mamba", "path/to/mamba-130m")
"""

from __future__ import annotations

import importlib

from ssmzoo import moved

__version__ = "0.1.0"
__all__ = ["__version__", "create_model", "list_models", "load_official", "ops"]

_HOMES = {"create_model": "ssmzoo.zoo", "list_models": "ssmzoo.presets", "load_official": "ssmzoo.released.load"}


moved.install()


def __getattr__(name: str):
    """Import the front door's functions when they are first asked for, so that `import ssmzoo` stays light."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name == "ops":
        return importlib.import_module("ssmzoo.ops")
    raise AttributeError(f"module 'ssmzoo' has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
