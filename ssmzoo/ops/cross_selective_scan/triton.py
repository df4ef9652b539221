"""cross_selective_scan on a GPU: the selective scan's kernels walk the map themselves, each group in its direction.

Nothing is laid out four times: time steps, B and C are products at every position of the map, and the four scans read
them, and the map, in place.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmzoo.ops.checks import why_not_float
from ssmzoo.ops.cross_selective_scan import cross_selective_scan
from ssmzoo.ops.library import Differentiable, Kernel
from ssmzoo.ops.selective_scan.triton import PASSES as SCAN_PASSES
from ssmzoo.ops.selective_scan.triton import Scan, gradients, scan, slots
from ssmzoo.ops.triton import DEVICE, MISSING, whole
from ssmzoo.ops.triton.variants import DTYPES, Variant, meta, train

PASSES = SCAN_PASSES | {  # with one state, its loop is unrolled into that of the chunks
    "forward": SCAN_PASSES["forward"]._replace(most=140),
    "backward": SCAN_PASSES["backward"]._replace(most=400),
}
TURNS = {"cross": 0b1010, "unidirectional": 0, "bidirectional": 0}  # directions that walk down the columns
FLIPS = {"cross": 0b1100, "unidirectional": 0, "bidirectional": 0b1100}  # and from the end


class Inputs(NamedTuple):
    """u (b h w e), delta (4 b l e), B and C (b l 4 n), all in the order of the map; dt_bias (4 e), A (4e n), D (4e)."""

    u: Tensor
    delta: Tensor
    B: Tensor
    C: Tensor
    dt_bias: Tensor
    A: Tensor
    D: Tensor
    scans: str


def _four(t: Tensor) -> Tensor:
    """(b 4 e l) of what the four directions share, (b h w e)."""
    return t.flatten(1, 2).mT.unsqueeze(1).expand(-1, 4, -1, -1)


def _scan_of(a: Inputs) -> Scan:
    B, C = (M.permute(0, 2, 3, 1) for M in (a.B, a.C))  # (b 4 n l)
    parameters = whole(a.D), None, whole(a.dt_bias.flatten()), None, None
    walk = (*a.u.shape[1:3], FLIPS[a.scans], TURNS[a.scans])
    return Scan(_four(a.u), a.delta.permute(1, 0, 3, 2), whole(a.A), B, C, *parameters, True, walk)


def saved(a: Inputs) -> Tensor:
    b, h, w, e = a.u.shape
    return slots(b, 4 * e, a.A.shape[1], h * w, a.u)


def _parts(a: Inputs) -> Tensor:
    """(4 b l e): one map for each direction."""
    b, h, w, e = a.u.shape
    return a.u.new_empty(4, b, h * w, e, dtype=torch.float32)


def forward(a: Inputs, save: bool):
    y = _parts(a)
    _, states = scan(_scan_of(a), y.permute(1, 0, 3, 2), save)
    return (y.sum(0).to(a.u.dtype).view(a.u.shape),), states


def backward(a: Inputs, states: Tensor, dy: Tensor) -> dict[str, Tensor]:
    du, ddelta = _parts(a), torch.empty_like(a.delta, memory_format=torch.contiguous_format)
    found = gradients(_scan_of(a), states, _four(dy), None, du.permute(1, 0, 3, 2), ddelta.permute(1, 0, 3, 2), None)
    grads = {"u": du.sum(0).view(a.u.shape), "delta": ddelta, "A": found["A"], "D": found["D"]}
    grads |= {name: found[name].permute(0, 3, 1, 2).contiguous() for name in "BC"}
    grads["dt_bias"] = found["bias"].view_as(a.dt_bias)
    return {name: grad.to(getattr(a, name).dtype) for name, grad in grads.items()}


KERNEL = Kernel(forward, backward, saved)
WALKS = Differentiable("cross_selective_scan_walks", Inputs, saved="states", like=lambda a: (a.u.new_empty(a.u.shape),))
WALKS.kernels["triton"] = KERNEL


def why_not(a) -> str | None:
    if a.x.numel() == 0 or a.A.numel() == 0:
        return "is given nothing to do"
    return why_not_float(a.x, a.x_proj, a.dt_proj, a.dt_bias, a.A, a.D)


@cross_selective_scan.register("triton", device=DEVICE, missing=MISSING, unsupported=why_not)
def cross_selective_scan_triton(a) -> Tensor:
    u, n = a.x.permute(0, 2, 3, 1), a.A.shape[1]  # (b h w e)
    steps = F.linear(u, a.x_proj.flatten(0, 1).to(u.dtype)).flatten(1, 2)  # (b l 4(r+2n))
    dt, B, C = steps.unflatten(-1, (4, -1)).split([a.dt_proj.shape[2], n, n], dim=-1)
    dt = dt.movedim(2, 0).flatten(1, 2)  # (4 bl r)
    delta = torch.matmul(dt, a.dt_proj.mT.to(dt.dtype)).unflatten(1, steps.shape[:2])  # (4 b l e)
    return WALKS(Inputs(u, delta, B, C, a.dt_bias, a.A, a.D, a.scans), "triton")


def variants() -> Iterator[Variant]:
    def call(dtype="bf16", sizes=(64, 28, 28, 384, 1), scans="cross"):
        (b, h, w, e, n), kind = sizes, DTYPES[dtype]
        sequences = (meta(b, h, w, e, dtype=kind), meta(4, b, h * w, e, dtype=kind))
        a = Inputs(
            *sequences,
            *(meta(b, h * w, 4, n, dtype=kind) for _ in "BC"),
            meta(4, e),
            meta(4 * e, n),
            meta(4 * e),
            scans,
        )
        return lambda: train(KERNEL, a)

    for dtype in DTYPES:
        yield Variant(f"{dtype}, b 64, 28 x 28, e 384, n 1", call(dtype), typical=dtype == "bf16")
    yield Variant("bf16, n 16", call(sizes=(64, 56, 56, 192, 16)))
    yield Variant("bf16, bidirectional", call(scans="bidirectional"))
    yield Variant("bf16, one large map", call(sizes=(1, 512, 512, 120, 16)))
