"""spatial_scan on our compiled CPU kernel (spatial_scan.c), for inference."""

from __future__ import annotations

import torch

from ssmzoo.ops.dispatch import needs_grad, unobserved
from ssmzoo.ops.native import VECTOR_LENGTH, kernel, pack, why_not_float
from ssmzoo.ops.spatial_scan import spatial_scan
from ssmzoo.ops.state_fusion import taps

KERNEL, MISSING = kernel("ssmzoo_spatial_scan")
CACHE = 1 << 19  # bytes of states that a task keeps at hand


def _tiles(b: int, e: int, columns: int, threads: int) -> int:
    """Tiles of channels per task: what fits the cache, and at least one task per thread."""
    tiles, row_bytes = -(-e // VECTOR_LENGTH), 11 * (columns + 10) * 4 * VECTOR_LENGTH
    return max(1, min(CACHE // row_bytes, -(-tiles * b // threads), tiles))


def _why_not(u, steps, dt_proj, dt_bias, A, D, kernels, alpha):
    if kernels is None:
        return "fuses states; without kernels the scan does it all"
    tensors = (u, steps, dt_proj, dt_bias, A, D, *kernels, alpha)
    if needs_grad(*tensors):
        return "has no backward; the operators it joins have"
    if not unobserved(*tensors):
        return "is not traced; the operators it joins are"
    if min(u.shape) == 0:
        return "has nothing to do for an empty map"
    return why_not_float(*tensors)


@spatial_scan.register("native", device="cpu", missing=MISSING, unsupported=_why_not)
def spatial_scan_native(u, steps, dt_proj, dt_bias, A, D, kernels, alpha):
    (b, h, w, e), r, threads = u.shape, dt_proj.shape[1], torch.get_num_threads()
    weights = taps(kernels, alpha, torch.float32).flatten(1).contiguous()  # (e 27)
    tensors = [t.float().contiguous() for t in (u, steps, dt_proj, dt_bias, A.squeeze(1), D)] + [weights]
    y = torch.empty(b, h, w, e)
    KERNEL(pack([*tensors, y], b, e, h, w, r, _tiles(b, e, w, threads), threads))
    return y.to(torch.promote_types(torch.promote_types(u.dtype, steps.dtype), D.dtype))
