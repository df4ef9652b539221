"""trapezoidal_scan and rotary_trapezoidal_scan of one rank on our compiled CPU kernels (trapezoidal_scan.c)."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ssmzoo.ops.checks import why_not_float
from ssmzoo.ops.library import Kernel
from ssmzoo.ops.native import VECTOR_LENGTH, kernel
from ssmzoo.ops.native.arguments import decays, in_rows, whole
from ssmzoo.ops.trapezoidal_scan import SCAN, Inputs, rotary_trapezoidal_scan, trapezoidal_scan

FORWARD, MISSING = kernel("ssmzoo_trapezoidal_scan_forward")
BACKWARD, _ = kernel("ssmzoo_trapezoidal_scan_backward")
CHUNK = 64  # steps; the matrices of a chunk and the state of a head then fit into the second-level cache


def saved(a: Inputs) -> Tensor:
    """States before every chunk, (b c h n p) with p padded to whole vectors, uninitialised."""
    (b, l, h, p), n = a.v.shape, a.k.shape[3]
    return a.v.new_empty(b, -(-l // CHUNK), h, n, -(-p // VECTOR_LENGTH) * VECTOR_LENGTH, dtype=torch.float32)


def _split(a: Inputs, tasks: int) -> int:
    """Parts to cut the heads of every group into, for about so many tasks."""
    (b, _, h, _), g = a.v.shape, a.k.shape[2]
    return min(h // g, -(-tasks // (b * g)))


def _call(function, a: Inputs, split: int, tensors: list[Tensor | None]) -> None:
    v, k, q = rows = in_rows(a.v), in_rows(a.k), in_rows(a.q)
    given = (a.k_bias, a.q_bias, a.phase, decays(a.a, a.seq_idx), a.gamma, a.beta, a.D)
    given = [*rows, *map(whole, given), *tensors]
    values = (
        *v.shape,
        *k.shape[2:],
        0 if a.phase is None else a.phase.shape[3],
        max(1, min(CHUNK, v.shape[1])),
        split,
        torch.get_num_threads(),
        *(stride for t in rows for stride in t.stride()[:3]),
        *(0 if t is None else t.data_ptr() for t in given),
    )
    function((ctypes.c_int64 * len(values))(*values))


def forward(a: Inputs, save: bool):
    (b, l, h, p), n = a.v.shape, a.k.shape[3]
    y, last = a.v.new_empty(b, l, h, p, dtype=torch.float32), a.v.new_empty(b, h, p, n, dtype=torch.float32)
    states = saved(a) if save else None
    _call(FORWARD, a, _split(a, 4 * torch.get_num_threads()), [whole(a.initial_state), states, y, last])
    return (y, last), states


def backward(a: Inputs, states: Tensor, dy: Tensor, dlast: Tensor | None) -> dict[str, Tensor]:
    (b, l, h), (g, n), split = a.v.shape[:3], a.k.shape[2:], _split(a, 2 * torch.get_num_threads())
    parts = {"k": (split, b, l, g, n), "q": (split, b, l, g, n), "k_bias": (b, h, n), "q_bias": (b, h, n), "D": (b, h)}
    names = ("v", "k", "q", "k_bias", "q_bias", "phase", "a", "gamma", "beta", "D", "initial_state")
    given = {name: t for name in names if (t := getattr(a, name)) is not None}
    grads = {name: a.v.new_empty(parts.get(name, t.shape), dtype=torch.float32) for name, t in given.items()}
    _call(BACKWARD, a, split, [states, whole(dy), whole(dlast), *(grads.get(name) for name in names)])
    grads |= {name: grads[name].sum(0) for name in parts if name in grads}
    return {name: grad.to(given[name].dtype) for name, grad in grads.items()}


SCAN.kernels["c"] = Kernel(forward, backward, saved)


def why_not(given) -> str | None:
    if given.mimo is not None:
        return "serves one rank, not mimo"
    if not given.v.numel() or not given.k.numel():
        return "has nothing to do for empty inputs"
    return why_not_float(*(t for t in given if isinstance(t, Tensor) and t is not given.seq_idx))


def one_rank(given, **turning: Tensor) -> tuple[Tensor, Tensor]:
    v, k, q, a = given.v, given.k[:, :, 0], given.q[:, :, 0], given.a
    y, state = SCAN(
        Inputs(v, k, q, a, given.gamma, given.beta, given.D, **turning)._replace(
            initial_state=given.initial_state, seq_idx=given.seq_idx
        ),
        "c",
    )
    return y[:, :, None], state


@trapezoidal_scan.register("c", device="cpu", missing=MISSING, unsupported=why_not)
def trapezoidal_scan_c(given) -> tuple[Tensor, Tensor]:
    return one_rank(given)


@rotary_trapezoidal_scan.register("c", device="cpu", missing=MISSING, unsupported=why_not)
def rotary_trapezoidal_scan_c(given) -> tuple[Tensor, Tensor]:
    return one_rank(given, phase=given.phase, k_bias=given.k_bias[:, 0], q_bias=given.q_bias[:, 0])
