"""ssd_scan and mamba_chunk_scan_combined on our compiled CPU kernels (ssd.c)."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ssmzoo.ops.checks import why_not_float
from ssmzoo.ops.library import Kernel
from ssmzoo.ops.native import VECTOR_LENGTH, kernel
from ssmzoo.ops.native.arguments import decays, in_rows, whole
from ssmzoo.ops.ssd import Recurrence, register

FORWARD, MISSING = kernel("ssmzoo_ssd_forward")
BACKWARD, _ = kernel("ssmzoo_ssd_backward")
CHUNK = 64  # steps; the matrices of a chunk and the state of a head then fit into the second-level cache


def chunk_length(l: int) -> int:
    return max(1, min(CHUNK, l))


def saved(a: Recurrence) -> Tensor:
    (b, l, h, p), n = a.x.shape, a.B.shape[3]
    shape = b, -(-l // chunk_length(l)), h, n, -(-p // VECTOR_LENGTH) * VECTOR_LENGTH
    return a.x.new_empty(shape, dtype=torch.float32)


def _split(b: int, h: int, g: int, tasks: int) -> int:
    """Parts to cut the heads of every group into, for about so many tasks."""
    return max(1, min(h // g, -(-tasks // max(1, b * g))))


def _call(function, x: Tensor, B: Tensor, C: Tensor, split: int, tensors: list[Tensor | None]) -> None:
    b, l, h, p = x.shape
    g, n = B.shape[2:]
    values = (
        b,
        l,
        h,
        p,
        g,
        n,
        chunk_length(l),
        split,
        torch.get_num_threads(),
        *x.stride()[:3],
        *B.stride()[:3],
        *C.stride()[:3],
        *(0 if t is None else t.data_ptr() for t in tensors),
    )
    function((ctypes.c_int64 * len(values))(*values))


def forward(a: Recurrence, save: bool):
    (b, l, h, p), (g, n) = a.x.shape, a.B.shape[2:]
    y, last = a.x.new_empty(b, l, h, p, dtype=torch.float32), a.x.new_empty(b, h, p, n, dtype=torch.float32)
    states = saved(a) if save else None
    x, B, C = in_rows(a.x), in_rows(a.B), in_rows(a.C)
    tensors = [
        x,
        whole(a.dt),
        decays(a.log_decay, a.seq_idx),
        B,
        C,
        whole(a.D),
        whole(a.initial_states),
        states,
        y,
        last,
    ]
    _call(FORWARD, x, B, C, _split(b, h, g, 4 * torch.get_num_threads()), tensors)
    return (y.to(a.x.dtype), last), states


def backward(a: Recurrence, states, dy, dlast):
    (b, l, h, p), (g, n) = a.x.shape, a.B.shape[2:]
    x, B, C = in_rows(a.x), in_rows(a.B), in_rows(a.C)
    split = _split(b, h, g, 2 * torch.get_num_threads())
    shapes = {
        "x": (b, l, h, p),
        "dt": (b, l, h),
        "log_decay": (b, l, h),
        "B": (split, b, l, g, n),
        "C": (split, b, l, g, n),
        "D": (b, h, p),
        "initial_states": (b, h, p, n),
    }
    grads = {name: x.new_empty(s) for name, s in shapes.items() if getattr(a, name) is not None}
    given = [x, whole(a.dt), decays(a.log_decay, a.seq_idx), B, C, whole(a.D), states, whole(dy), whole(dlast)]
    _call(BACKWARD, x, B, C, split, [*given, *(grads.get(name) for name in shapes)])
    for name in ("B", "C"):
        grads[name] = grads[name].sum(0) if split > 1 else grads[name][0]
    if a.D is not None:
        grads["D"] = grads["D"].sum(0)
    return {name: grad.to(getattr(a, name).dtype) for name, grad in grads.items()}


register("c", Kernel(forward, backward, saved), why_not_float, device="cpu", missing=MISSING)
