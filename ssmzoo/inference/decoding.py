"""Tokens one after the other over a state that is nobody else's, so that it may be overwritten: what `generate` does.

    logits, state = prefill(model, input_ids)
    decoding = Decoding(model, state)       # a copy: the state given stays as it is
    logits = decoding(token)                # token (b) -> logits (b v), valid until the next call

On a CPU all of a token is one native call, from ids to logits, where the modules are plain and their layers write
themselves down as a program (`ssmzoo.layers.one_call`): nothing is allocated, and states are read and written once. On
a GPU the step is recorded as a CUDA graph when two states are found to be alike. Everything else is called as it is.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ssmzoo.inference.captured import StaticStep, cuda_graph, why_not_static
from ssmzoo.layers.decoder import LanguageModel
from ssmzoo.layers.one_call import free_to_decode
from ssmzoo.layers.state import map_state
from ssmzoo.ops.in_place import states_in_place


class Decoding:
    """model(token, state) with the state kept here: see above.

    state   read it between calls; the next call may overwrite its tensors
    """

    def __init__(self, model: nn.Module, state: Any):
        self.model, self._state = model, state
        self.owned = False  # whether the tensors of `_state` are nobody else's
        self.session = self.watch = None
        self.refused = not isinstance(model, LanguageModel)  # a session was asked for and there was none
        self.static, self.tried = None, False

    @property
    def state(self) -> Any:
        return self._state if self.session is None else self.session.state()

    @torch.no_grad()
    def __call__(self, token: Tensor, alive: Tensor | None = None) -> Tensor:
        """token (b) int64; alive (b) bool: sequences that go on. Of others neither logits nor states mean anything."""
        if self.static is not None:
            return self.static(token[:, None])
        if not self.refused and self._native(token):
            return self.session.advance(token.contiguous())
        return self._called(token[:, None], None if alive is None else alive[:, None])

    def _native(self, token: Tensor) -> bool:
        """Whether the session serves this token; it is opened anew when something of the model has changed."""
        if not free_to_decode() or not token.is_cpu or token.dtype is not torch.int64 or "cpu" in RECORD:
            return False
        if self.session is not None:
            if self.watch.same():
                return True
            self._leave()
        opened = self.model.open_session(self._state)
        if opened is None:
            self.refused = True
            return False
        (self.session, self.watch), self._state = opened, None
        return True

    def _leave(self) -> None:
        self._state, self.owned, self.session = self.session.state(), True, None

    def _called(self, token: Tensor, mask: Tensor | None) -> Tensor:
        if self.session is not None:
            self._leave()
        record = RECORD.get(token.device.type)
        if record is None and mask is None:
            if not self.owned:
                self._state, self.owned = map_state(Tensor.clone, self._state), True
            with states_in_place():
                logits, self._state, _ = self.model(token, self._state)
            return logits[:, -1]
        logits, state, _ = self.model(token, self._state, mask=mask)
        before, self._state, self.owned = self._state, state, False
        if record is not None and mask is None and not self.tried:
            self.tried = True
            if why_not_static(self.model, before, state) is None:
                self.static = self._recorded(token, record)
        return logits[:, -1]

    def _recorded(self, token: Tensor, record: Callable) -> StaticStep | None:
        try:
            return StaticStep(self.model, token, self._state, record)
        except RuntimeError as error:  # something in the model cannot be recorded
            first_line = str(error).strip().partition("\n")[0]
            warnings.warn(f"decoding goes on without a CUDA graph: {first_line}", RuntimeWarning, stacklevel=2)
            return None


RECORD: dict[str, Callable] = {"cuda": cuda_graph}  # how a step is recorded, by the kind of device
