"""mamba2_step in PyTorch; on a GPU through the two update operators, for which there are fused kernels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ssmzoo.ops.causal_conv1d import causal_conv1d_update
from ssmzoo.ops.checks import compute_dtype
from ssmzoo.ops.in_place import own_state
from ssmzoo.ops.mamba2_step import mamba2_step
from ssmzoo.ops.rms_norm import rms_norm
from ssmzoo.ops.ssd import ssd_state_update


@mamba2_step.register("torch")
def mamba2_step_torch(a) -> tuple[Tensor, Tensor, Tensor]:
    return by_updates(a) if a.u.is_cuda else mamba2_step.reference(*a)  # the reference is vectorised already


def by_updates(a) -> tuple[Tensor, Tensor, Tensor]:
    h, p, n = a.ssm_state.shape[1:]
    e, gn, dtype = h * p, a.ngroups * n, compute_dtype(a.u, a.ssm_state)
    z, x, dt = F.linear(a.u, a.in_proj, a.in_bias).split([e, e + 2 * gn, h], dim=-1)
    conv, S = own_state(a.conv_state, x.dtype), own_state(a.ssm_state, dtype)
    x = causal_conv1d_update(x, conv, a.conv_weight, a.conv_bias, activation="silu")
    x, B, C = x.split([e, gn, gn], dim=-1)
    dt = F.softplus(dt.to(dtype) + a.dt_bias.to(dtype)).clamp(a.dt_min, a.dt_max)
    B, C = (t.unflatten(-1, (a.ngroups, n)) for t in (B, C))
    D = a.D.to(dtype).reshape(h, -1).expand(h, p)
    y = ssd_state_update(S, x.unflatten(-1, (h, p)), dt, -torch.exp(a.A_log.to(dtype)), B, C, D)
    y = y.flatten(1).to(dtype) * F.silu(z.to(dtype))
    if a.norm_weight is not None:
        y = rms_norm(y, a.norm_weight.to(dtype), a.eps)
    return F.linear(y.to(a.u.dtype), a.out_proj, a.out_bias), conv, S
