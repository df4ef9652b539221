"""mamba3_step on our compiled CPU kernel (mamba3_step.c)."""

from __future__ import annotations

import functools
import struct

import torch
from torch import Tensor

from ssmzoo.ops.mamba3_step import mamba3_step
from ssmzoo.ops.mamba_step.c import why_not
from ssmzoo.ops.native import kernel

STEP, MISSING = kernel("ssmzoo_mamba3_step")
MAX_ROWS = 4  # every sequence reads all weights
TENSORS = 14  # of the arguments; numbers follow


@mamba3_step.register(
    "c", device="cpu", missing=MISSING, unsupported=functools.partial(why_not, count=TENSORS, most=MAX_ROWS)
)
def mamba3_step_c(a) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    u = a.u.contiguous()
    (b, d), (_, h, p, n), m = u.shape, a.ssm_state.shape, a.phase.shape[2]
    made = [torch.empty_like(t) for t in (u, a.phase, a.ssm_state, a.last_k, a.last_x)]
    pointers = (0 if t is None else t.data_ptr() for t in (u, *a[1:TENSORS], *made))
    numbers = (a.A_floor, a.B_eps, a.C_eps, a.eps)
    STEP(struct.pack("27q4d", *pointers, b, d, h, p, n, m, a.ngroups, torch.get_num_threads(), *numbers))
    return tuple(made)
