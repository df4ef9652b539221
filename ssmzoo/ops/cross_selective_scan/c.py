"""cross_selective_scan on our compiled CPU kernels (cross_selective_scan.c)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ssmzoo.ops.checks import why_not_float
from ssmzoo.ops.cross_selective_scan import cross_selective_scan
from ssmzoo.ops.library import Differentiable, Kernel
from ssmzoo.ops.linear_act import linear_act
from ssmzoo.ops.native import VECTOR_LENGTH, commit, kernel, pack

FORWARD, MISSING = kernel("ssmzoo_cross_selective_scan_forward")
BACKWARD, _ = kernel("ssmzoo_cross_selective_scan_backward")
CHUNK = 32  # steps between saved states, as in the C file
COLUMNS = {"cross": 0b1010, "unidirectional": 0, "bidirectional": 0}
REVERSED = {"cross": 0b1100, "unidirectional": 0, "bidirectional": 0b1100}
TASKS = 8  # wanted
MAX_TILES = 16  # tiles of channels that a task keeps in cache at once


class Inputs(NamedTuple):
    """u (b h w e), steps (b h w 4(r+2n)), dt_proj (4 e r), dt_bias (4 e), A (4e n), D (4e): contiguous float32."""

    u: Tensor
    steps: Tensor
    dt_proj: Tensor
    dt_bias: Tensor
    A: Tensor
    D: Tensor
    scans: str


def saved(a: Inputs) -> Tensor:
    """States at chunk starts."""
    b, h, w, e = a.u.shape
    chunks, lanes = -(-h * w // CHUNK), -(-e // VECTOR_LENGTH) * VECTOR_LENGTH
    return a.u.new_empty(b * 4 * chunks * lanes * a.A.shape[1])


def _tiling(b: int, e: int) -> tuple[int, int]:
    """(tiles of channels per task, tasks per batch entry and pair of directions): few, so that rows stay whole;
    the same however many threads there are, since the order of sums follows from them."""
    tiles = -(-e // VECTOR_LENGTH)
    wanted = -(-TASKS // max(1, 2 * b))
    per_task = max(1, min(MAX_TILES, -(-tiles // wanted)))
    return per_task, -(-tiles // per_task)


def _pack(a: Inputs, results: list[Tensor | None], save: bool) -> bytes:
    b, h, w, e = a.u.shape
    flat = [a.u.flatten(1, 2), a.steps.flatten(1, 2), a.dt_proj, a.dt_bias, a.A, a.D]
    for t in results:
        flat.append(t.flatten(1, 2) if t is not None and t.ndim == 4 else t)
    sizes = b, e, h, w, a.A.shape[1], a.dt_proj.shape[2]
    return pack(flat, *sizes, save, COLUMNS[a.scans], REVERSED[a.scans], _tiling(b, e)[0], torch.get_num_threads())


def forward(a: Inputs, save: bool):
    b, h, w, e = a.u.shape
    y = a.u.new_empty(b, 2, h * w, e)
    states = saved(a) if save else None
    commit(y, states)
    FORWARD(_pack(a, [y, states, *[None] * 7], save))
    return ((y[:, 0] + y[:, 1]).view(b, h, w, e),), states


def backward(a: Inputs, states: Tensor, dy: Tensor) -> dict[str, Tensor]:
    b, h, w, e = a.u.shape
    n, r = a.A.shape[1], a.dt_proj.shape[2]
    du, dsteps = a.u.new_empty(b, 2, h * w, e), a.u.new_empty(_tiling(b, e)[1], b, h * w * a.steps.shape[-1])
    sums = [a.u.new_empty(b, *size) for size in ((4, e * r), (4, e), (4 * e, n), (4 * e,))]
    dy = dy.contiguous()
    commit(du, dsteps)
    BACKWARD(_pack(a, [None, states, dy, du, dsteps, *sums], True))
    grads = {"u": (du[:, 0] + du[:, 1]).view_as(a.u), "steps": dsteps.sum(0).view_as(a.steps)}
    for name, parts in zip(("dt_proj", "dt_bias", "A", "D"), sums):
        grads[name] = parts.sum(0).view_as(getattr(a, name))
    return grads


SCAN = Differentiable("cross_selective_scan", Inputs, saved="states", like=lambda a: (torch.empty_like(a.u),))
SCAN.kernels["c"] = Kernel(forward, backward, saved)


def why_not(a) -> str | None:
    return why_not_float(a.x, a.x_proj, a.dt_proj, a.dt_bias, a.A, a.D)


def _scan(scan: Callable, a: tuple) -> Tensor:
    u, dtype = a.x.permute(0, 2, 3, 1), torch.float32
    steps = linear_act(u, a.x_proj.flatten(0, 1)).to(dtype).contiguous()  # (b h w 4(r+2n))
    u, dt_proj, dt_bias = u.to(dtype).contiguous(), a.dt_proj.to(dtype).contiguous(), a.dt_bias.to(dtype).contiguous()
    A, D = a.A.to(dtype).contiguous(), a.D.to(dtype).contiguous()
    return scan(Inputs(u, steps, dt_proj, dt_bias, A, D, a.scans)).to(a.x.dtype)


EAGERLY = functools.partial(_scan, functools.partial(SCAN.eager, "c"))
cross_selective_scan.register("c", device="cpu", missing=MISSING, unsupported=why_not, eager=EAGERLY)(
    functools.partial(_scan, lambda inputs: SCAN(inputs, "c"))
)
