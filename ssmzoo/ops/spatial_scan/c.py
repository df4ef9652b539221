"""spatial_scan on our compiled CPU kernels (spatial_scan.c)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ssmzoo.ops.checks import why_not_float
from ssmzoo.ops.library import Differentiable, Kernel
from ssmzoo.ops.native import VECTOR_LENGTH, commit, kernel, pack
from ssmzoo.ops.spatial_scan import spatial_scan
from ssmzoo.ops.state_fusion import taps

FORWARD, MISSING = kernel("ssmzoo_spatial_scan_forward")
BACKWARD, _ = kernel("ssmzoo_spatial_scan_backward")
CACHE = 1 << 19  # bytes of states that a task keeps at hand


class Inputs(NamedTuple):
    """u (b h w e), steps (b h w r+2), dt_proj (e r), dt_bias, A, D (e), taps (27 e): contiguous float32."""

    u: Tensor
    steps: Tensor
    dt_proj: Tensor
    dt_bias: Tensor
    A: Tensor
    D: Tensor
    taps: Tensor


def _tiles(b: int, e: int, columns: int, threads: int) -> int:
    """Tiles of channels per task: what fits the cache, and at least one task per thread."""
    tiles, row_bytes = -(-e // VECTOR_LENGTH), 11 * (columns + 10) * 4 * VECTOR_LENGTH
    return max(1, min(CACHE // row_bytes, -(-tiles * b // threads), tiles))


def _pack(a: Inputs, results: list[Tensor | None], tiles: int) -> tuple[list[Tensor | None], bytes]:
    (b, h, w, e), r = a.u.shape, a.dt_proj.shape[1]
    tensors = [a.u, a.steps, a.dt_proj.T.contiguous(), a.dt_bias, a.A, a.D, a.taps, *results]
    return tensors, pack(tensors, b, e, h, w, r, tiles, torch.get_num_threads())


def forward(a: Inputs, save: bool):
    b, _, w, e = a.u.shape
    y = torch.empty_like(a.u)
    commit(y)
    alive, arguments = _pack(a, [y, *[None] * 8], _tiles(b, e, w, torch.get_num_threads()))
    FORWARD(arguments)
    return (y,), None


def backward(a: Inputs, saved: None, dy: Tensor) -> dict[str, Tensor]:
    (b, h, w, e), r, threads = a.u.shape, a.dt_proj.shape[1], torch.get_num_threads()
    tiles = -(-e // VECTOR_LENGTH)
    per_task = max(1, min(tiles, -(-tiles * b // threads)))
    padded = -(-h * w // VECTOR_LENGTH) * VECTOR_LENGTH
    dy = dy.contiguous()
    du, dsteps = torch.empty_like(a.u), a.u.new_empty(-(-tiles // per_task), b, r + 2, padded)
    sums = {name: a.u.new_empty(b, *getattr(a, name).shape) for name in ("dt_bias", "A", "D", "taps")}
    dproj = a.u.new_empty(b, r, e)
    commit(du)
    alive, arguments = _pack(a, [None, dy, du, dsteps, dproj, *sums.values()], per_task)
    BACKWARD(arguments)
    dsteps = dsteps.sum(0)[..., : h * w].transpose(1, 2).contiguous().view(a.steps.shape)
    grads = {"u": du, "steps": dsteps, "dt_proj": dproj.sum(0).T.contiguous()}
    return grads | {name: parts.sum(0) for name, parts in sums.items()}


SCAN = Differentiable("spatial_scan", Inputs, like=lambda a: (torch.empty_like(a.u),))
SCAN.kernels["c"] = Kernel(forward, backward)


def why_not(a) -> str | None:
    if a.kernels is None:
        return "fuses states; without kernels the scan does it all"
    if min(a.u.shape) == 0:
        return "has nothing to do for an empty map"
    return why_not_float(a.u, a.steps, a.dt_proj, a.dt_bias, a.A, a.D, *a.kernels, a.alpha)


@spatial_scan.register("c", device="cpu", missing=MISSING, unsupported=why_not)
def spatial_scan_c(a) -> Tensor:
    weights = taps(a.kernels, a.alpha, torch.float32).flatten(1).T  # (27 e)
    tensors = (a.u, a.steps, a.dt_proj, a.dt_bias, a.A.squeeze(1), a.D, weights)
    y = SCAN(Inputs(*[t.float().contiguous() for t in tensors]), "c")
    return y.to(torch.promote_types(torch.promote_types(a.u.dtype, a.steps.dtype), a.D.dtype))
