"""gated_linear_recurrence on our compiled CPU kernels (gated_linear_recurrence.c): one pass over memory each way."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from ssmzoo.ops.gated_linear_recurrence import RECURRENCE, gated_linear_recurrence
from ssmzoo.ops.library import Kernel
from ssmzoo.ops.native import commit, kernel

FORWARD, MISSING = kernel("ssmzoo_gated_linear_recurrence")
BACKWARD, _ = kernel("ssmzoo_gated_linear_recurrence_backward")


def _rows(t: Tensor) -> Tensor:
    """Channels next to each other in memory; any strides of batch and time."""
    return t if t.stride(2) == 1 or t.shape[2] == 1 else t.contiguous()


def _call(function, a, decay: Tensor, tensors: list[Tensor | None]) -> None:
    strides = [s for t in (decay, tensors[0]) for s in t.stride()[:2]]
    pointers = [0 if t is None else t.data_ptr() for t in (decay, *tensors)]
    numbers = (*a.x.shape, bool(a.reverse), torch.get_num_threads())
    function(struct.pack("15q", *pointers, *strides, *numbers))


def forward(a, save: bool):
    x, h0 = _rows(a.x), None if a.initial_state is None else a.initial_state.contiguous()
    h = x.new_empty(x.shape)
    commit(h)
    _call(FORWARD, a, _rows(a.a), [x, h0, h, None, None])
    return (h,), None


def backward(a, h: Tensor, dh: Tensor) -> dict[str, Tensor]:
    dh, h0 = _rows(dh), None if a.initial_state is None else a.initial_state.contiguous()
    da, dx = a.x.new_empty(a.x.shape), a.x.new_empty(a.x.shape)
    commit(da, dx)
    _call(BACKWARD, a, _rows(a.a), [dh, h0, h.contiguous(), da, dx])
    found = {"a": da, "x": dx}
    if h0 is not None:
        end = a.x.shape[1] - 1 if a.reverse else 0
        found["initial_state"] = a.a[:, end] * dx[:, end] if a.x.shape[1] else torch.zeros_like(h0)
    return found


def why_not(a) -> str | None:
    if any(t is not None and t.dtype != torch.float32 for t in (a.a, a.x, a.initial_state)):
        return "computes in float32 only"
    return None if a.x.numel() else "has nothing to do for empty inputs"


RECURRENCE.kernels["c"] = Kernel(forward, backward)
gated_linear_recurrence.register("c", device="cpu", missing=MISSING, unsupported=why_not)(lambda a: RECURRENCE(a, "c"))
