"""gated_delta_rule on our compiled CPU kernels (gated_delta_rule.c)."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ssmzoo.ops.checks import why_not_float
from ssmzoo.ops.gated_delta_rule import RULE, Inputs, gated_delta_rule
from ssmzoo.ops.library import Kernel
from ssmzoo.ops.native import VECTOR_LENGTH, kernel
from ssmzoo.ops.native.arguments import decays, in_rows, whole

FORWARD, MISSING = kernel("ssmzoo_gated_delta_rule_forward")
BACKWARD, _ = kernel("ssmzoo_gated_delta_rule_backward")
CHUNK = 32  # steps between states that are kept; the states of a chunk's steps then fit into the second-level cache


def saved(a: Inputs) -> Tensor:
    """States before every chunk, (b c h n p) with p padded to whole vectors, uninitialised."""
    (b, l, h, n), p = a.q.shape, a.v.shape[3]
    return a.q.new_empty(b, -(-l // CHUNK), h, n, -(-p // VECTOR_LENGTH) * VECTOR_LENGTH, dtype=torch.float32)


def _call(function, a: Inputs, tensors: list[Tensor | None]) -> None:
    q, k, v = rows = in_rows(a.q), in_rows(a.k), in_rows(a.v)
    given = [*rows, decays(a.g, a.seq_idx), whole(a.beta), *tensors]
    values = (
        *q.shape,
        v.shape[3],
        CHUNK,
        torch.get_num_threads(),
        a.g.ndim == 4,
        *(stride for t in rows for stride in t.stride()[:3]),
        *(0 if t is None else t.data_ptr() for t in given),
    )
    function((ctypes.c_int64 * len(values))(*values))


def forward(a: Inputs, save: bool):
    b, l, h, n = a.q.shape
    p = a.v.shape[3]
    y, last = a.q.new_empty(b, l, h, p, dtype=torch.float32), a.q.new_empty(b, h, n, p, dtype=torch.float32)
    states = saved(a) if save else None
    _call(FORWARD, a, [whole(a.initial_state), states, y, last])
    return (y.to(a.v.dtype), last), states


def backward(a: Inputs, states: Tensor, dy: Tensor, dlast: Tensor | None) -> dict[str, Tensor]:
    names = ("q", "k", "v", "g", "beta", "initial_state")
    grads = {n: a.q.new_empty(t.shape, dtype=torch.float32) for n in names if (t := getattr(a, n)) is not None}
    _call(BACKWARD, a, [states, whole(dy), whole(dlast), *(grads.get(name) for name in names)])
    return {name: grad.to(getattr(a, name).dtype) for name, grad in grads.items()}


RULE.kernels["c"] = Kernel(forward, backward, saved)


def why_not(a) -> str | None:
    return why_not_float(a.q, a.k, a.v, a.g, a.beta, a.initial_state)


gated_delta_rule.register("c", device="cpu", missing=MISSING, unsupported=why_not)(lambda a: RULE(a, "c"))
