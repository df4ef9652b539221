"""One decoding step recorded once and replayed for every token: on a GPU a CUDA graph, whose few hundred launches cost
one.

    step = StaticStep(model, token, state, cuda_graph)      # token (b 1)
    logits = step(token)      # (b v), valid until the next call; the state advances inside

A graph reads and writes fixed addresses: the token and the state are kept in buffers, and the step that is recorded
brings the buffers forward in place, by kernels that write over the state they are given where they can
(`ssmzoo.ops.in_place`) and by copies otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ssmzoo.layers.feedforward.moe import MoE
from ssmzoo.layers.state import map_state
from ssmzoo.ops.in_place import states_in_place


class StaticStep:
    """record: (run, undo) -> a function that does what `run` did; it may call run before, and undo takes that back."""

    def __init__(self, model: nn.Module, token: Tensor, state: Any, record: Callable[[Callable, Callable], Callable]):
        self.model, self.token = model, token.clone()
        self.state = map_state(lambda t: t.clone(memory_format=torch.contiguous_format), state)
        first = map_state(Tensor.clone, self.state)
        self.replay = record(self.run, lambda: advance_into(self.state, first))

    def run(self) -> None:
        with states_in_place():
            logits, new, _ = self.model(self.token, self.state)
        advance_into(self.state, new)
        self.logits = logits[:, -1]

    def __call__(self, token: Tensor) -> Tensor:
        self.token.copy_(token)
        self.replay()
        return self.logits


def plain_calls(run: Callable[[], None], undo: Callable[[], None]) -> Callable[[], None]:
    """The same without a graph, for tests: nothing is recorded."""
    return run


def cuda_graph(run: Callable[[], None], undo: Callable[[], None]) -> Callable[[], None]:
    """Record `run` on the current GPU; it is called twice before, so that kernels are compiled and workspaces made."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        run()
        run()
        undo()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def advance_into(old: Any, new: Any) -> None:
    """Copy every tensor of `new` over the one of `old`, but for those that are the same."""
    pairs = [(a, b) for a, b in zip(tensors(old), tensors(new), strict=True) if a is not b]
    own = {a.untyped_storage().data_ptr() for a in tensors(old)}
    # one that lies in a buffer is read before anything is written
    pairs = [(a, b.clone() if b.untyped_storage().data_ptr() in own else b) for a, b in pairs]
    for a, b in pairs:
        a.copy_(b)


def tensors(state: Any) -> list[Tensor]:
    """Of a nested state, in order."""
    found = []
    map_state(lambda t: found.append(t) or t, state)
    return found


def why_not_static(model: nn.Module, before: Any, after: Any) -> str | None:
    """Why a step from the state `before` to `after` cannot be replayed, None when it can."""
    a, b = tensors(before), tensors(after)
    if len(a) != len(b) or any(s.shape != t.shape or s.dtype != t.dtype for s, t in zip(a, b)):
        return "its state grows"
    if _fixed(before) != _fixed(after):
        return "its state holds numbers that a graph would not see change"
    if not a or any(t.device != a[0].device for t in b):
        return "its state does not lie on one device"
    if a[0].shape[0] > 1 and any(isinstance(m, MoE) for m in model.modules()):
        return "sequences that have ended would take places with its experts"
    return None


def _fixed(state: Any) -> Any:
    """What of a nested state is no tensor."""
    if isinstance(state, Tensor):
        return None
    if isinstance(state, dict):
        return {key: _fixed(value) for key, value in state.items()}
    return [_fixed(value) for value in state] if isinstance(state, (tuple, list)) else state
