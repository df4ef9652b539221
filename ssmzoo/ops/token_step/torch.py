"""token_step by the modules, whose own operators' fastest backends serve."""

from __future__ import annotations

from ssmzoo.ops.token_step import token_step


@token_step.register("torch")
def token_step_torch(a):
    return a.program.layers(a.x, a.states)
