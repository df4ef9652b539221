"""complex_scan on our compiled CPU kernels (complex_scan.c): one pass over memory each way."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from ssmzoo.ops.complex_scan import SCAN, complex_scan, of_pairs
from ssmzoo.ops.library import Kernel
from ssmzoo.ops.native import commit, kernel

FORWARD, MISSING = kernel("ssmzoo_complex_scan")
BACKWARD, _ = kernel("ssmzoo_complex_scan_backward")


def _rows(t: Tensor) -> Tensor:
    """Numbers of a row next to each other in memory; any strides of batch and time."""
    return t if t.stride(3) == 1 and (t.stride(2) == 2 or t.shape[2] == 1) else t.contiguous()


def _call(function, a: Tensor, tensors: list[Tensor | None]) -> None:
    strides = [s for t in (a, tensors[0]) for s in t.stride()[:2]]
    pointers = [0 if t is None else t.data_ptr() for t in (a, *tensors)]
    batch, l, n, _ = a.shape
    function(struct.pack("15q", *pointers, *strides, batch, l, 2 * n, torch.get_num_threads()))


def forward(given, save: bool):
    b, h0 = _rows(given.b), None if given.initial_state is None else given.initial_state.contiguous()
    h = b.new_empty(b.shape)
    commit(h)
    _call(FORWARD, _rows(given.a), [b, h0, h, None, None, None])
    return (h,), None


def backward(given, h: Tensor, dh: Tensor) -> dict[str, Tensor]:
    h0 = None if given.initial_state is None else given.initial_state.contiguous()
    found = {"a": h.new_empty(h.shape), "b": h.new_empty(h.shape)}
    if h0 is not None:
        found["initial_state"] = torch.empty_like(h0)
    commit(found["a"], found["b"])
    tensors = [_rows(dh), h0, h.contiguous(), found["a"], found["b"], found.get("initial_state")]
    _call(BACKWARD, _rows(given.a), tensors)
    return found


def why_not(given) -> str | None:
    if any(t is not None and t.dtype != torch.complex64 for t in given):
        return "computes in complex64 only"
    return None if given.b.numel() else "has nothing to do for empty inputs"


SCAN.kernels["c"] = Kernel(forward, backward)
complex_scan.register("c", device="cpu", missing=MISSING, unsupported=why_not)(lambda given: of_pairs(given, "c"))
