"""taylor_attention on our compiled CPU kernels (taylor_attention.c)."""

from __future__ import annotations

import ctypes
import struct

import torch
from torch import Tensor

from ssmzoo.ops.checks import why_not_float
from ssmzoo.ops.library import Kernel
from ssmzoo.ops.native import VECTOR_LENGTH, kernel
from ssmzoo.ops.native.arguments import in_rows, whole
from ssmzoo.ops.taylor_attention import TAYLOR, Inputs, document_starts, n_features, taylor_attention

FORWARD, MISSING = kernel("ssmzoo_taylor_attention_forward")
BACKWARD, _ = kernel("ssmzoo_taylor_attention_backward")
CHUNK = 64  # positions; the features of a chunk and the state of a head then fit into the second-level cache


def _padded(n: int) -> int:
    return -(-n // VECTOR_LENGTH) * VECTOR_LENGTH


def saved(a: Inputs) -> Tensor:
    """The state before every chunk: n rows of p values, and n sums of features."""
    (b, l, h, p), n = a.v.shape, n_features(a.q.shape[-1])
    chunk = max(1, min(CHUNK, l))
    return a.v.new_empty(b, h, -(-l // chunk), n * _padded(p) + _padded(n), dtype=torch.float32)


def _call(function, a: Inputs, tensors: list[Tensor | None]) -> None:
    b, l, h, p = a.v.shape
    q, k, v = in_rows(a.q), in_rows(a.k), in_rows(a.v)
    starts = None if a.seq_idx is None else document_starts(a.seq_idx).contiguous()
    given = [q, k, v, whole(a.mask), starts, *tensors]
    values = (
        b,
        l,
        h,
        q.shape[-1],
        p,
        max(1, min(CHUNK, l)),
        torch.get_num_threads(),
        struct.unpack("q", struct.pack("d", a.eps))[0],
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *(0 if t is None else t.data_ptr() for t in given),
    )
    function((ctypes.c_int64 * len(values))(*values))


def forward(a: Inputs, save: bool):
    b, _, h, p = a.v.shape
    y = a.v.new_empty(a.v.shape, dtype=torch.float32)
    last = y.new_empty(b, h, n_features(a.q.shape[-1]), p + 1)
    states = saved(a) if save else None
    _call(FORWARD, a, [whole(a.state), states, y, last])
    return (y.to(a.v.dtype), last), states


def backward(a: Inputs, states: Tensor, dy: Tensor, dlast: Tensor | None) -> dict[str, Tensor]:
    given = {"q": a.q, "k": a.k, "v": a.v, "state": a.state}
    grads = {name: None if t is None else t.new_empty(t.shape, dtype=torch.float32) for name, t in given.items()}
    _call(BACKWARD, a, [states, whole(dy), whole(dlast), *grads.values()])
    return {name: grad.to(given[name].dtype) for name, grad in grads.items() if grad is not None}


TAYLOR.kernels["c"] = Kernel(forward, backward, saved)


def why_not(a) -> str | None:
    return why_not_float(a.q, a.k, a.v, a.state)


taylor_attention.register("c", device="cpu", missing=MISSING, unsupported=why_not)(
    lambda a: TAYLOR(Inputs(a.q, a.k, a.v, a.state, a.mask, a.seq_idx, float(a.eps)), "c")
)
