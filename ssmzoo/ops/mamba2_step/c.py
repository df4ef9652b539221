"""mamba2_step on our compiled CPU kernel (mamba2_step.c)."""

from __future__ import annotations

import functools
import struct

import torch
from torch import Tensor

from ssmzoo.ops.mamba2_step import mamba2_step
from ssmzoo.ops.mamba_step.c import why_not
from ssmzoo.ops.native import kernel

STEP, MISSING = kernel("ssmzoo_mamba2_step")
TENSORS = 13  # of the arguments; numbers follow


@mamba2_step.register("c", device="cpu", missing=MISSING, unsupported=functools.partial(why_not, count=TENSORS))
def mamba2_step_c(a) -> tuple[Tensor, Tensor, Tensor]:
    u = a.u.contiguous()
    (b, d), (_, h, p, n), k = u.shape, a.ssm_state.shape, a.conv_state.shape[2]
    out, conv, ssm = torch.empty_like(u), torch.empty_like(a.conv_state), torch.empty_like(a.ssm_state)
    pointers = (0 if t is None else t.data_ptr() for t in (u, *a[1:TENSORS], out, conv, ssm))
    sizes = b, d, h, p, n, a.ngroups, k, a.D.numel() != h, torch.get_num_threads()
    STEP(struct.pack("25q3d", *pointers, *sizes, a.eps, a.dt_min, a.dt_max))
    return out, conv, ssm
