"""What models carry along a sequence, and padding that must not touch it.

Every causal mixer is `forward(x, state=None, *, mask=None, seq_idx=None) -> (y, state)`, with `prefix=None` as well if
it can read leading positions in both directions, and a class attribute `packed_prefix = True` if it can do so in every
one of the documents of a packed row (`inside_prefix`). Its state is a NamedTuple of
tensors with the batch first; a model's state is a tuple of its layers' states. Nothing is hidden in modules, so a state
can be kept, copied, reordered or differentiated through like any other value. `state_bytes` tells how much it is.

Padding is handled by moving the real tokens of every row to the front, once per call: afterwards left padding, right
padding and holes are the same thing, a row of `lengths[i]` real tokens followed by slots that nothing may look at.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class ModelOutput(NamedTuple):
    """What every sequence model returns.

    logits (b l v) | state: pass it back in to continue the sequences | aux: scalar tensors; keys ending in "_loss" are
    already weighted and are added to the task's loss, the others are metrics.
    """

    logits: Tensor
    state: Any
    aux: dict[str, Tensor]


class Padding(NamedTuple):
    """Rows whose real tokens stand in front. Made by `left_align`; mixers accept it in place of a bool mask.

    mask (b l) True for the first lengths[i] slots of row i | lengths (b)
    order (b l) slot t holds the token that stood at order[t] | inverse (b l) the way back
    """

    mask: Tensor
    lengths: Tensor
    order: Tensor
    inverse: Tensor

    def align(self, x: Tensor) -> Tensor:
        """(b l ...) as given -> (b l ...) with the real tokens in front."""
        return _take(x, self.order)

    def restore(self, x: Tensor) -> Tensor:
        """(b l ...) with the real tokens in front -> (b l ...) at their positions."""
        return _take(x, self.inverse)

    def align_seq_idx(self, seq_idx: Tensor | None) -> Tensor | None:
        """Document numbers (b l) in the new order; padding takes the number of its row's last token: no boundary."""
        if seq_idx is None:
            return None
        last = (self.lengths - 1).clamp(min=0)[:, None]
        slots = torch.arange(seq_idx.shape[1], device=seq_idx.device)[None]
        return self.align(seq_idx).gather(1, torch.minimum(slots, last))


def left_align(mask: Tensor | Padding | None) -> Padding | None:
    """Mask (b l), True = real token -> the move that brings the real tokens of every row to the front, in order."""
    if mask is None or isinstance(mask, Padding):
        return mask
    if mask.ndim != 2 or mask.is_floating_point():
        raise ValueError(
            f"mask must be a bool tensor (batch, length), True = real token; got {mask.dtype} {tuple(mask.shape)}"
        )
    mask = mask.bool()
    lengths = mask.sum(1)
    inverse = torch.where(mask, mask.cumsum(1) - 1, lengths[:, None] + (~mask).cumsum(1) - 1)
    slots = torch.arange(mask.shape[1], device=mask.device).expand_as(inverse)
    order = torch.empty_like(inverse).scatter(1, inverse, slots)
    return Padding(slots < lengths[:, None], lengths, order, inverse)


def is_step(x: Tensor, state, padding, seq_idx) -> bool:
    """One more token for every row, outside of training: the case for which mixers keep a short path."""
    return state is not None and x.shape[1] == 1 and padding is None and seq_idx is None and not torch.is_grad_enabled()


def call_aligned(
    forward: Callable, x: Tensor, state, mask: Tensor, seq_idx: Tensor | None, **more
) -> tuple[Tensor, Any]:
    """Run a mixer whose `forward` understands a Padding on inputs with a bool mask. x (b l d) -> y (b l d), state."""
    if mask.shape != x.shape[:2]:
        raise ValueError(f"mask has shape {tuple(mask.shape)}, the input wants {tuple(x.shape[:2])}")
    padding = left_align(mask)
    y, state = forward(padding.align(x), state, mask=padding, seq_idx=padding.align_seq_idx(seq_idx), **more)
    return padding.restore(y), state


def conv_window(
    x: Tensor, previous: Tensor | None, width: int, padding: Padding | None = None, seq_idx: Tensor | None = None
) -> Tensor:
    """The last `width` inputs of every row and of its last document, oldest first: the state of a causal convolution.

    x (b c l) inputs, previous (b c width) window before them or None for zeros -> (b c width)
    """
    b, _, length = x.shape
    if padding is None:
        window = x[..., max(0, length - width) :].contiguous()  # a copy: a view would keep the whole input alive
        if length < width:
            head = window.new_zeros(b, x.shape[1], width) if previous is None else previous.to(x.dtype)
            window = torch.cat([head[..., length:], window], dim=-1)
        if seq_idx is None:
            return window
        first = length - width + torch.arange(width, device=x.device)  # index of each window slot, < 0: before x
        index = first.expand(b, width)
    else:
        head = x.new_zeros(b, x.shape[1], width) if previous is None else previous.to(x.dtype)
        slots = padding.lengths[:, None] + torch.arange(width, device=x.device)  # (b width) into [head, x]
        window = torch.cat([head, x], dim=-1).gather(2, slots[:, None].expand(b, x.shape[1], width))
        if seq_idx is None:
            return window
        index = slots - width
    same = seq_idx.gather(1, index.clamp(min=0)) == seq_idx[:, -1:]
    return window * same[:, None]


def inside_prefix(prefix: Tensor, length: int) -> Tensor:
    """The positions that may be read in both directions, (b l) bool, from what mixers are given: the number of leading
    ones in every row (b), or, for packed documents, these positions themselves (b l)."""
    if prefix.ndim == 2:
        return prefix
    return torch.arange(length, device=prefix.device) < prefix[:, None]


def refuse_prefix(prefix: Any, model: str) -> None:
    """For models that read in one direction only. Raises ValueError for any prefix but None and 0."""
    if prefix is not None and bool(torch.as_tensor(prefix).any()):
        raise ValueError(f"prefix: {model} reads in one direction only; leave prefix out")


def map_state(function: Callable[[Tensor], Tensor], state: Any) -> Any:
    """Apply `function` to every tensor of a nested state of (named) tuples, lists and dicts."""
    if isinstance(state, Tensor):
        return function(state)
    if isinstance(state, dict):
        return {key: map_state(function, value) for key, value in state.items()}
    if isinstance(state, (tuple, list)):
        values = [map_state(function, value) for value in state]
        return type(state)(*values) if hasattr(state, "_fields") else type(state)(values)
    return state


def select_rows(state: Any, rows: Tensor) -> Any:
    """The state of the sequences `rows` (integer tensor): reorder, drop or repeat members of a batch."""
    return map_state(lambda tensor: tensor.index_select(0, rows), state)


def state_bytes(model: nn.Module, length: int) -> int:
    """Bytes of state that a sequence of `length` tokens leaves behind, in the model's precision.

    Every causal mixer tells its own by a method `state_bytes(length)`; this is their sum, 0 for a model without any.
    """
    return sum(m.state_bytes(length) for m in model.modules() if hasattr(m, "state_bytes"))


def itemsize(module: nn.Module) -> tuple[int, int]:
    """Bytes of a number in the precision of a module's parameters, and in that of its recurrences: at least fp32."""
    size = next((p.element_size() for p in module.parameters() if p.is_floating_point()), 4)
    return size, max(4, size)


def detach(state: Any) -> Any:
    """The same values without their history, for training on a stream of chunks."""
    return map_state(Tensor.detach, state)


def _take(x: Tensor, index: Tensor) -> Tensor:
    index = index.reshape(index.shape + (1,) * (x.ndim - 2)).expand(x.shape)
    return torch.gather(x, 1, index)
