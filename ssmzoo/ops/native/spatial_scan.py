"""spatial_scan on our compiled CPU kernels (spatial_scan.c)."""

from __future__ import annotations

import torch

from ssmzoo.ops.dispatch import differentiate
from ssmzoo.ops.native import VECTOR_LENGTH, commit, kernel, pack, why_not_float
from ssmzoo.ops.spatial_scan import spatial_scan
from ssmzoo.ops.state_fusion import taps

FORWARD, MISSING = kernel("ssmzoo_spatial_scan_forward")
BACKWARD, _ = kernel("ssmzoo_spatial_scan_backward")
CACHE = 1 << 19  # bytes of states that a task keeps at hand

_LIBRARY = torch.library.Library("ssmzoo", "FRAGMENT")
_ARGS = "Tensor u, Tensor steps, Tensor dt_proj, Tensor dt_bias, Tensor A, Tensor D, Tensor taps"
_LIBRARY.define(f"spatial_scan({_ARGS}) -> Tensor")
_LIBRARY.define(f"spatial_scan_backward(Tensor dy, {_ARGS}) -> (" + ", ".join(["Tensor"] * 7) + ")")


def _tiles(b: int, e: int, columns: int, threads: int) -> int:
    """Tiles of channels per task: what fits the cache, and at least one task per thread."""
    tiles, row_bytes = -(-e // VECTOR_LENGTH), 11 * (columns + 10) * 4 * VECTOR_LENGTH
    return max(1, min(CACHE // row_bytes, -(-tiles * b // threads), tiles))


def _forward(u, steps, dt_proj, dt_bias, A, D, taps):
    """u (b h w e), steps (b h w r+2), A (e), taps (27 e), all contiguous float32 -> y (b h w e)"""
    (b, h, w, e), r, threads = u.shape, dt_proj.shape[1], torch.get_num_threads()
    y = torch.empty_like(u)
    commit(y)
    weights = dt_proj.T.contiguous()  # (r e)
    tensors = [u, steps, weights, dt_bias, A, D, taps, y, *[None] * 8]
    FORWARD(pack(tensors, b, e, h, w, r, _tiles(b, e, w, threads), threads))
    return y


def _backward(dy, u, steps, dt_proj, dt_bias, A, D, taps):
    (b, h, w, e), r, threads = u.shape, dt_proj.shape[1], torch.get_num_threads()
    tiles = -(-e // VECTOR_LENGTH)
    per_task = max(1, min(tiles, -(-tiles * b // threads)))
    padded = -(-h * w // VECTOR_LENGTH) * VECTOR_LENGTH
    dy, weights = dy.contiguous(), dt_proj.T.contiguous()  # (r e)
    du, dsteps = torch.empty_like(u), u.new_empty(-(-tiles // per_task), b, r + 2, padded)
    sums = [u.new_empty(b, *t.shape) for t in (weights, dt_bias, A, D, taps)]
    commit(du)
    tensors = [u, steps, weights, dt_bias, A, D, taps, None, dy, du, dsteps, *sums]
    BACKWARD(pack(tensors, b, e, h, w, r, per_task, threads))
    dsteps = dsteps.sum(0)[..., : h * w].transpose(1, 2).contiguous().view(steps.shape)
    dproj, *others = (t.sum(0) for t in sums)
    return du, dsteps, dproj.T.contiguous(), *others


_LIBRARY.impl("spatial_scan", _forward, "CPU")
_LIBRARY.impl("spatial_scan_backward", _backward, "CPU")


@torch.library.register_fake("ssmzoo::spatial_scan", lib=_LIBRARY)
def _forward_fake(u, *rest):
    return torch.empty_like(u)


@torch.library.register_fake("ssmzoo::spatial_scan_backward", lib=_LIBRARY)
def _backward_fake(dy, *tensors):
    return tuple(torch.empty_like(t) for t in tensors)


differentiate("spatial_scan", _LIBRARY)


def _why_not(u, steps, dt_proj, dt_bias, A, D, kernels, alpha):
    if kernels is None:
        return "fuses states; without kernels the scan does it all"
    if min(u.shape) == 0:
        return "has nothing to do for an empty map"
    return why_not_float(u, steps, dt_proj, dt_bias, A, D, *kernels, alpha)


@spatial_scan.register("native", device="cpu", missing=MISSING, unsupported=_why_not)
def spatial_scan_native(u, steps, dt_proj, dt_bias, A, D, kernels, alpha):
    weights = taps(kernels, alpha, torch.float32).flatten(1).T  # (27 e)
    tensors = [t.float().contiguous() for t in (u, steps, dt_proj, dt_bias, A.squeeze(1), D, weights)]
    y = torch.ops.ssmzoo.spatial_scan(*tensors)
    return y.to(torch.promote_types(torch.promote_types(u.dtype, steps.dtype), D.dtype))
