"""selective_scan_fn on our compiled CPU kernels (selective_scan.c)."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmzoo.ops.native import VECTOR_LENGTH, commit, kernel, pack, why_not_float
from ssmzoo.ops.selective_scan import selective_scan_fn
from ssmzoo.ops.selective_scan_op import KERNELS, ScanKernel, empty_gradients, scan_with

FORWARD, MISSING = kernel("ssmzoo_selective_scan_forward")
BACKWARD, _ = kernel("ssmzoo_selective_scan_backward")
MAX_TILES = 16  # tiles of channels that a task keeps in cache at once


def chunk_length(n: int) -> int:
    """Steps between saved states: 32, more when a state is wide, so that saved states stay comparable to u."""
    return min(256, max(32, -(-n // 32) * 32))


def saved_shape(b: int, e: int, l: int, n: int) -> tuple[int, ...]:
    return -(-l // chunk_length(n)), b, e, n


def _tiling(b: int, e: int, g: int, threads: int) -> tuple[int, int]:
    """(tiles of channels per task, tasks per group): some tasks per thread, the same ones on every run."""
    lanes, per_group = VECTOR_LENGTH, max(1, e // max(1, g))
    tiles = -(-per_group // lanes)
    parts = g if per_group >= lanes else -(-g // (lanes // per_group))
    wanted = max(8, 4 * threads)
    per_task = min(MAX_TILES, tiles, max(1, -(-b * parts * tiles // wanted)))
    return per_task, -(-tiles // per_task)


def _arguments(u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx, delta_softplus, save, results, tiling):
    (b, e, l), n = u.shape, A.shape[1]
    g = next((M.shape[1] for M in (B, C) if M.ndim == 4), 1)
    if seq_idx is not None and seq_idx.dtype not in (torch.int32, torch.int64):
        seq_idx = seq_idx.long()
    tensors = [u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx, *results]
    return tensors, pack(
        tensors,
        b,
        e,
        l,
        n,
        g,
        B.ndim == 2,
        C.ndim == 2,
        delta_softplus,
        save,
        chunk_length(n),
        tiling[0],
        torch.get_num_threads(),
    )


def forward(u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx, delta_softplus, save):
    (b, e, l), n = u.shape, A.shape[1]
    out, last = torch.empty_like(u), u.new_empty(b, e, n, dtype=torch.float32)
    saved = u.new_empty(saved_shape(b, e, l, n) if save else (0,), dtype=torch.float32)
    commit(out, saved)
    g = next((M.shape[1] for M in (B, C) if M.ndim == 4), 1)
    results = [out, last, saved if save else None, *[None] * 11]
    alive, arguments = _arguments(
        u,
        delta,
        A,
        B,
        C,
        D,
        z,
        delta_bias,
        initial_state,
        seq_idx,
        delta_softplus,
        save,
        results,
        _tiling(b, e, g, torch.get_num_threads()),
    )
    FORWARD(arguments)
    return out, last, saved


def backward(dout, dlast_state, saved, u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx, delta_softplus):
    (b, e, l), n = u.shape, A.shape[1]
    g = next((M.shape[1] for M in (B, C) if M.ndim == 4), 1)
    tiling = _tiling(b, e, g, torch.get_num_threads())
    grads = empty_gradients(u, delta, A, B, C, D, z, delta_bias, initial_state)
    du, ddelta, _, _, _, _, dz, _, dinitial = grads

    def scratch(*shape: int) -> Tensor:
        return (u.new_empty if e else u.new_zeros)(shape, dtype=torch.float32)

    commit(du, ddelta, dz)
    dA = scratch(b, e, n)
    dB, dC = (scratch(b, e, n) if M.ndim == 2 else scratch(tiling[1], b, g, l, n) for M in (B, C))
    dD, dbias = (None if t is None else scratch(b, e) for t in (D, delta_bias))
    results = [
        None,
        None,
        saved,
        dout,
        dlast_state,
        du,
        ddelta,
        None if z is None else dz,
        None if initial_state is None else dinitial,
        dA,
        dD,
        dbias,
        *(d if d.ndim == 3 else d.flatten(3) for d in (dB, dC)),
    ]  # (b e n), or (tasks b g l*n)
    alive, arguments = _arguments(
        u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx, delta_softplus, True, results, tiling
    )
    BACKWARD(arguments)
    grads[2] = _total(dA, A)
    grads[3], grads[4] = (
        _total(d, M) if M.ndim == 2 else _total(d, M).permute(0, 1, 3, 2) for d, M in ((dB, B), (dC, C))
    )
    if D is not None:
        grads[5] = _total(dD, D)
    if delta_bias is not None:
        grads[7] = _total(dbias, delta_bias)
    return tuple(grads)


def _total(parts: Tensor, argument: Tensor) -> Tensor:
    return (parts[0] if parts.shape[0] == 1 else parts.sum(0)).to(argument.dtype)


def why_not(
    u,
    delta,
    A,
    B,
    C,
    D=None,
    z=None,
    delta_bias=None,
    delta_softplus=False,
    return_last_state=False,
    *,
    initial_state=None,
    seq_idx=None,
) -> str | None:
    if A.is_complex():
        return "complex A runs on the reference backend only"
    return why_not_float(u, delta, A, B, C, D, z, delta_bias, initial_state)


KERNELS["native"] = ScanKernel(forward, backward, saved_shape)
selective_scan_fn.register("native", device="cpu", missing=MISSING, unsupported=why_not)(scan_with("native"))
