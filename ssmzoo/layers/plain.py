"""Whether a submodule may be read as the weights it holds.

A fused operator takes the weights of several modules at once and skips their `forward`. That is the same computation
only while each of them is exactly torch's class: a low-rank adapter, a quantised replacement, a parametrisation, a hook
or a replaced `forward` would be passed over without a word. Fused paths therefore stand behind `is_plain`, and call the
modules one by one otherwise:

    y = linear_act(x, fc.weight, fc.bias, "gelu") if is_plain(fc) else F.gelu(fc(x))
"""

from __future__ import annotations

import torch
from torch import nn

PLAIN = frozenset({nn.Linear, nn.Conv1d, nn.Conv2d, nn.Embedding, nn.LayerNorm})


def is_plain(*modules: nn.Module, among: frozenset[type] = PLAIN) -> bool:
    """Whether every module is exactly of a class of `among` (no subclass), with its forward and without hooks.

    As with torch's own modules, compiled code keeps the answer that held when it was compiled.
    """
    if torch.nn.modules.module._has_any_global_hook():  # torch has no public way to ask
        return False
    for m in modules:
        own = m.__dict__
        if type(m) not in among or own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own:
            return False
        if own["_backward_hooks"] or own["_backward_pre_hooks"]:
            return False
    return True
