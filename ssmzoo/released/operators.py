"""Operators as modules, so that they are verified like models."""

from __future__ import annotations

import functools

from torch import nn


class FunctionModule(nn.Module):
    """A parameterless function as a module, for families that are operators."""

    def __init__(self, function, **kwargs):
        super().__init__()
        self.function = functools.partial(function, **kwargs)

    def forward(self, *args, **kwargs):
        return self.function(*args, **kwargs)
