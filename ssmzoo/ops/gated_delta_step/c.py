"""gated_delta_step on our compiled CPU kernel (gated_delta_step.c)."""

from __future__ import annotations

import functools
import struct

import torch
from torch import Tensor

from ssmzoo.ops.gated_delta_step import gated_delta_step
from ssmzoo.ops.mamba_step.c import why_not
from ssmzoo.ops.native import kernel

STEP, MISSING = kernel("ssmzoo_gated_delta_step")
MAX_ROWS = 4  # every sequence reads all weights
TENSORS = 12  # of the arguments; numbers follow


@gated_delta_step.register(
    "c", device="cpu", missing=MISSING, unsupported=functools.partial(why_not, count=TENSORS, most=MAX_ROWS)
)
def gated_delta_step_c(a) -> tuple[Tensor, Tensor, Tensor]:
    u = a.u.contiguous()
    (b, d), (_, h, n, p), k = u.shape, a.state.shape, a.conv_state.shape[2]
    out, conv, state = torch.empty_like(u), torch.empty_like(a.conv_state), torch.empty_like(a.state)
    pointers = (0 if t is None else t.data_ptr() for t in (u, *a[1:TENSORS], out, conv, state))
    sizes = b, d, a.num_heads, h, n, p, k, torch.get_num_threads()
    STEP(struct.pack("23q2d", *pointers, *sizes, a.beta_scale, a.eps))
    return out, conv, state
