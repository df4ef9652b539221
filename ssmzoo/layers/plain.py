"""Whether a submodule may be read as the weights it holds.

A fused operator takes the weights of several modules at once and skips their `forward`. That is the same computation
only while each of them is exactly torch's class: a low-rank adapter, a quantised replacement, a parametrisation, a hook
or a replaced `forward` would be passed over without a word. Fused paths therefore stand behind `is_plain`, and call the
modules one by one otherwise:

    y = linear_act(x, fc.weight, fc.bias, "gelu") if is_plain(fc) else F.gelu(fc(x))

A hook made by `observer` only notes that a forward ran, and may be passed over.
"""

from __future__ import annotations

from collections.abc import Callable

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
        if type(m) not in among or "forward" in own:
            return False
        if (hooks := own["_forward_hooks"]) and _act(hooks) or (hooks := own["_forward_pre_hooks"]) and _act(hooks):
            return False
        if own["_backward_hooks"] or own["_backward_pre_hooks"]:
            return False
    return True


@torch.no_grad()
def matrix_of(linear: nn.Module) -> torch.Tensor:
    """W (e d) of a module that computes W x + b, whatever it is made of: for those who look into a model.

    A low-rank adapter's is asked for with the columns of the identity; a quantised layer tells its own.
    """
    if isinstance(linear, nn.Linear) and is_plain(linear):
        return linear.weight
    if hasattr(linear, "matrix"):
        return linear.matrix()
    like = next(p for p in linear.parameters() if p.is_floating_point())
    identity = torch.eye(linear.in_features, device=like.device, dtype=like.dtype)
    return (linear(identity) - linear(torch.zeros_like(identity[:1]))).T


def observer(hook: Callable) -> Callable:
    """Mark a forward hook or pre-hook that neither changes nor reads what passes, so that fused paths may skip it."""
    hook.observes = True
    return hook


def _act(hooks: dict[int, Callable]) -> bool:
    return not all(getattr(hook, "observes", False) for hook in hooks.values())
