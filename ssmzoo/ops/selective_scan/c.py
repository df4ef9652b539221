"""selective_scan_fn on our compiled CPU kernels (selective_scan.c)."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmzoo.ops.checks import why_not_float
from ssmzoo.ops.library import Kernel
from ssmzoo.ops.native import VECTOR_LENGTH, commit, kernel, pack
from ssmzoo.ops.selective_scan import empty_gradients, groups_of, register, why_not_complex

FORWARD, MISSING = kernel("ssmzoo_selective_scan_forward")
BACKWARD, _ = kernel("ssmzoo_selective_scan_backward")
TASKS = 12  # wanted; each touches every page of the sequences
MAX_TILES = 16  # tiles of channels that a task keeps in cache at once


def chunk_length(n: int) -> int:
    """Steps between saved states: 32, more when a state is wide, so that saved states stay comparable to u."""
    return min(256, max(32, -(-n // 32) * 32))


def saved(a) -> Tensor:
    (b, e, l), n = a.u.shape, a.A.shape[1]
    return a.u.new_empty(-(-l // chunk_length(n)), b, e, n, dtype=torch.float32)


def _tiling(b: int, e: int, g: int, tasks: int = TASKS) -> tuple[int, int]:
    """(tiles of channels per task, tasks per group). In the backward the same ones however many threads there are,
    since the order of sums for B and C follows from them."""
    lanes, per_group = VECTOR_LENGTH, max(1, e // max(1, g))
    tiles = -(-per_group // lanes)
    parts = g if per_group >= lanes else -(-g // (lanes // per_group))
    per_task = min(MAX_TILES, tiles, max(1, -(-b * parts * tiles // tasks)))
    return per_task, -(-tiles // per_task)


def _arguments(a, g, save, results, tiling):
    (b, e, l), n = a.u.shape, a.A.shape[1]
    seq_idx = a.seq_idx
    if seq_idx is not None and seq_idx.dtype not in (torch.int32, torch.int64):
        seq_idx = seq_idx.long()
    tensors = [a.u, a.delta, a.A, a.B, a.C, a.D, a.z, a.delta_bias, a.initial_state, seq_idx, *results]
    return tensors, pack(
        tensors,
        b,
        e,
        l,
        n,
        g,
        a.B.ndim == 2,
        a.C.ndim == 2,
        a.delta_softplus,
        save,
        chunk_length(n),
        tiling[0],
        torch.get_num_threads(),
    )


def forward(a, save):
    (b, e, _), n, g = a.u.shape, a.A.shape[1], groups_of(a)
    out, last = torch.empty_like(a.u), a.u.new_empty(b, e, n, dtype=torch.float32)
    states = saved(a) if save else None
    commit(out, states)
    tiling = _tiling(b, e, g, max(TASKS, 2 * torch.get_num_threads()))
    alive, arguments = _arguments(a, g, save, [out, last, states, *[None] * 11], tiling)
    FORWARD(arguments)
    return (out, last), states


def backward(a, states, dout, dlast_state):
    (b, e, l), n, g = a.u.shape, a.A.shape[1], groups_of(a)
    tiling = _tiling(b, e, g)
    grads = empty_gradients(a)

    def scratch(*shape: int) -> Tensor:
        return (a.u.new_empty if e else a.u.new_zeros)(shape, dtype=torch.float32)

    commit(grads["u"], grads["delta"], grads.get("z"))
    sums = {"A": scratch(b, e, n)}
    for name, M in (("B", a.B), ("C", a.C)):
        sums[name] = scratch(b, e, n) if M.ndim == 2 else scratch(tiling[1], b, g, l, n)
    for name, t in (("D", a.D), ("delta_bias", a.delta_bias)):
        sums[name] = None if t is None else scratch(b, e)
    results = [
        *(None, None, states, dout, dlast_state),
        *(grads.get(name) for name in ("u", "delta", "z", "initial_state")),
        *(sums[name] for name in ("A", "D", "delta_bias")),
        *(d if d.ndim == 3 else d.flatten(3) for d in (sums["B"], sums["C"])),
    ]  # (b e n), or (tasks b g l*n)
    alive, arguments = _arguments(a, g, True, results, tiling)
    BACKWARD(arguments)
    for name, parts in sums.items():
        if parts is not None:
            total = (parts[0] if parts.shape[0] == 1 else parts.sum(0)).to(getattr(a, name).dtype)
            grads[name] = total.permute(0, 1, 3, 2) if total.ndim == 4 else total
    return grads


def why_not(a) -> str | None:
    return why_not_complex(a) or why_not_float(a.u, a.delta, a.A, a.B, a.C, a.D, a.z, a.delta_bias, a.initial_state)


register("c", Kernel(forward, backward, saved), device="cpu", missing=MISSING, unsupported=why_not)
