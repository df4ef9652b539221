"""States that decoding steps overwrite instead of returning new ones: what a captured step needs, whose addresses stay.

    with states_in_place():
        out, conv_state, ssm_state = mamba_step(u, conv_state, ssm_state, ...)    # the tensors given, advanced

A backend may still return a new tensor (the torch forms do where they compose one); whoever keeps the buffers copies it
over when it is not the same object.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor


@contextlib.contextmanager
def states_in_place() -> Iterator[None]:
    """Within the block, kernels of decoding steps may write the next state over the one they are given."""
    global _in_place
    previous, _in_place = _in_place, True
    try:
        yield
    finally:
        _in_place = previous


def next_state(state: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Where the next state goes: over `state`, or into a new tensor of its shape (of `dtype`, by default its own)."""
    dtype = dtype or state.dtype
    return state if _in_place and state.dtype == dtype else torch.empty_like(state, dtype=dtype)


def own_state(state: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The state as an operator that works in place may have it: `state` itself, or a copy."""
    dtype = dtype or state.dtype
    return state if _in_place and state.dtype == dtype else state.to(dtype, copy=True)


_in_place = False
