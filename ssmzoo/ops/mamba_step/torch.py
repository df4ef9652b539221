"""mamba_step in PyTorch; on a GPU through the two update operators, for which there are fused kernels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ssmzoo.ops.causal_conv1d import causal_conv1d_update
from ssmzoo.ops.checks import compute_dtype
from ssmzoo.ops.in_place import own_state
from ssmzoo.ops.mamba_step import mamba_step
from ssmzoo.ops.selective_state_update import selective_state_update


@mamba_step.register("torch")
def mamba_step_torch(a) -> tuple[Tensor, Tensor, Tensor]:
    return by_updates(a) if a.u.is_cuda else mamba_step.reference(*a)  # the reference is vectorised already


def by_updates(a) -> tuple[Tensor, Tensor, Tensor]:
    n, r, dtype = a.A_log.shape[1], a.dt_proj.shape[1], compute_dtype(a.u, a.ssm_state)
    u = a.u if a.in_proj is None else F.linear(a.u, a.in_proj, a.in_bias)
    x, z = u.chunk(2, dim=-1)
    conv, h = own_state(a.conv_state, x.dtype), own_state(a.ssm_state)
    x = causal_conv1d_update(x, conv, a.conv_weight, a.conv_bias, activation="silu")
    dt, B, C = F.linear(x, a.x_proj).split([r, n, n], dim=-1)
    dt, A = F.linear(dt, a.dt_proj), -torch.exp(a.A_log.to(dtype))
    D, bias = a.D.to(dtype), a.dt_bias.to(dtype)
    y = selective_state_update(h, x, dt, A, B, C, D, z=z, dt_bias=bias, dt_softplus=True)
    return (y if a.out_proj is None else F.linear(y, a.out_proj, a.out_bias)), conv, h
