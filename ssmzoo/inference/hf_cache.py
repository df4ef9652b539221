"""The state of a zoo model as the cache that transformers' generation carries along."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from ssmzoo.inference.decoding import Decoding
from ssmzoo.layers.state import map_state, select_rows


class StateCache(Cache):
    """state: what the model returned, None before the first token; seen: positions read, padding included.

    Single tokens advance the state in place (`token`): tensors that were read from `state` before are overwritten. Its
    size does not grow with the sequence (but for layers of attention). It cannot be cropped: a recurrence does not run
    backwards.
    """

    def __init__(self):
        super().__init__(layers=[])
        self.state = None
        self.seen = 0

    @property
    def state(self) -> Any:
        return self._state if self._decoding is None else self._decoding.state

    @state.setter
    def state(self, state: Any) -> None:
        self._state, self._decoding = state, None

    def token(self, model: nn.Module, token: Tensor) -> Tensor:
        """One more token (b) of every sequence -> logits (b 1 v)."""
        if self._decoding is None or self._decoding.model is not model:
            self._decoding, self._state = Decoding(model, self.state), None
        self.seen += 1
        return self._decoding(token)[:, None].clone()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_state": map_state(Tensor.clone, self.state), "_decoding": None}

    is_compileable = is_sliding = is_initialized = False

    def advance(self, state: Any, positions: int) -> None:
        """Take the state after `positions` more positions."""
        self.state, self.seen = state, self.seen + positions

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1  # no limit

    get_max_cache_shape = get_max_length  # before transformers 5.23

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows of the batch in another order, some of them repeated."""
        self.state = select_rows(self.state, beam_idx)

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.state = map_state(lambda tensor: tensor.repeat_interleave(repeats, dim=0), self.state)

    def reset(self) -> None:
        self.state, self.seen = None, 0

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise ValueError("the state of a recurrent model cannot be cropped; read the shorter text anew")

    def __len__(self) -> int:
        return 0 if self.state is None else len(self.state)

    def __repr__(self) -> str:
        sizes: list[int] = []
        map_state(lambda tensor: sizes.append(tensor.numel()) or tensor, self.state)
        return f"StateCache({self.seen} positions, {sum(sizes):,} numbers)"


def as_mask(attention_mask: Tensor | None, length: int) -> Tensor | None:
    """transformers' mask (b, past + l), 1 for real tokens -> ours for the last l positions; None: all are real."""
    if attention_mask is None:
        return None
    if attention_mask.ndim != 2 or attention_mask.shape[1] < length:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; expected (batch, length) with 1 for real tokens "
            f"and 0 for padding, at least the {length} positions of this call"
        )
    mask = attention_mask[:, -length:].bool()
    return None if not torch.compiler.is_compiling() and bool(mask.all()) else mask


def is_one_token(input_ids: Tensor | None) -> bool:
    """Whether a call is one of decoding on a CPU: one token of every sequence, without gradients."""
    if input_ids is None or input_ids.shape[1] != 1 or torch.is_grad_enabled():
        return False
    return input_ids.is_cpu and not torch.compiler.is_compiling()
