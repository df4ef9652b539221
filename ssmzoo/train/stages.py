"""Where in a model's depth a parameter lies, by its name."""

from __future__ import annotations

import re

from torch import nn

from ssmzoo.released.fit import role

BLOCK = re.compile(r"(?:^|\.)(?:layers|blocks)\.(\d+)\.")
FIRST = ("patch_embed", "conv_first", "embedding", "token_embed")


def stage_of(model: nn.Module, name: str) -> int | None:
    """The number of the stage or block of a parameter; -1 before the first, None behind the last."""
    if match := BLOCK.search(name):
        return int(match[1])
    first = name.removeprefix("backbone.").split(".")[0]
    return -1 if first.startswith(FIRST) or role(model, name) == "embedding" else None
