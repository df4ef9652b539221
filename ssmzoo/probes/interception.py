"""The former way to stand between models and operators; `ssmzoo.ops.observe` is the present one."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable

from torch import nn

from ssmzoo import ops


def operators(model: nn.Module, **replacements: Callable) -> contextlib.AbstractContextManager:
    """`ssmzoo.ops.observe(**replacements)`, which holds for every model."""
    warnings.warn("use ssmzoo.ops.observe(name=function)", DeprecationWarning, stacklevel=2)
    return ops.observe(**replacements)
