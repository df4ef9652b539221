"""mamba_step on our compiled CPU kernel (mamba_step.c)."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ssmzoo.ops.eager import why_not_eager
from ssmzoo.ops.mamba_step import mamba_step
from ssmzoo.ops.native import kernel

STEP, MISSING = kernel("ssmzoo_mamba_step")
MAX_ROWS = 64  # beyond, products of large matrices are bound by arithmetic, which torch's are better at


def why_not(a, count: int | None = None, most: int = MAX_ROWS) -> str | None:
    """Why the step of a whole mixer does not serve a call.

    count  how many of the arguments are tensors, u the first of them; None: all
    most   how many sequences it serves at once
    """
    if torch.is_grad_enabled():
        return "serves decoding: without gradients"
    if a.u.shape[0] > most:
        return f"serves up to {most} sequences, got {a.u.shape[0]}"
    for t in a[1:count]:
        if t is not None and not t.is_contiguous():
            return f"computes with contiguous tensors, got strides {t.stride()}"
    return why_not_eager(*a[:count])


@mamba_step.register("c", device="cpu", missing=MISSING, unsupported=why_not)
def mamba_step_c(a) -> tuple[Tensor, Tensor, Tensor]:
    u, rest = a.u.contiguous(), a[1:]
    (b, d), (e, n) = u.shape, a.A_log.shape
    if a.in_proj is None:  # u is [x, z] already
        d = e if a.out_proj is None else a.out_proj.shape[0]
    out = u.new_empty(b, e if a.out_proj is None else d)
    conv, ssm = torch.empty_like(a.conv_state), torch.empty_like(a.ssm_state)
    pointers = (0 if t is None else t.data_ptr() for t in (u, *rest, out, conv, ssm))
    # without the large matrices there is little to share
    threads = torch.get_num_threads() if a.in_proj is not None else 1
    STEP((ctypes.c_int64 * 24)(*pointers, b, d, e, n, a.dt_proj.shape[1], a.conv_weight.shape[1], threads))
    return out, conv, ssm
