"""One token through a whole Mamba-2 mixer: what decoding does most, as one operator.

    [z, xBC, dt] = W_in u;  x, B, C = split(SiLU(conv over the last k inputs xBC));  dt = clamp(softplus(dt + b_dt))
    S = exp(dt A) S + dt x B^T;  y = RMSNorm((S C + D x) SiLU(z));  out = W_out y

Letters: b batch, d model width, h heads of p channels, e = h p, n state size, g groups sharing B and C, k taps,
c = e + 2 g n.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ssmzoo.ops.checks import compute_dtype, expect_one_device
from ssmzoo.ops.dispatch import op


@op(check=expect_one_device)
def mamba2_step(
    u: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    in_proj: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    norm_weight: Tensor | None,
    out_proj: Tensor,
    in_bias: Tensor | None = None,
    out_bias: Tensor | None = None,
    ngroups: int = 1,
    eps: float = 1e-5,
    dt_min: float = 0.0,
    dt_max: float = math.inf,
) -> tuple[Tensor, Tensor, Tensor]:
    """Advance a Mamba-2 mixer by one token; the states given are left alone.

    u           (b d)
    conv_state  (b c k) the last k inputs of the convolution, oldest first
    ssm_state   (b h p n) fp32
    in_proj     (e+c+h d), in_bias (e+c+h); conv_weight (c k), conv_bias (c); dt_bias (h); A_log (h), A = -exp(A_log)
    D           (h) or (e)
    norm_weight (e) of the norm over all e channels, behind the gate; None: no norm
    out_proj    (d e), out_bias (d)
    returns     out (b d), the new conv_state and ssm_state

    Source: Dao & Gu 2024 (arXiv 2405.21060), section 7; the same mathematics as the sequence form.
    """
    h, p, n = ssm_state.shape[1:]
    e, gn, dtype = h * p, ngroups * n, compute_dtype(u, ssm_state)
    z, x, dt = F.linear(u, in_proj, in_bias).split([e, e + 2 * gn, h], dim=-1)
    conv = torch.cat([conv_state[..., 1:].to(x.dtype), x[..., None]], dim=-1)
    x = (conv.to(dtype) * conv_weight.to(dtype)).sum(-1)
    x = F.silu(x if conv_bias is None else x + conv_bias.to(dtype))
    x, B, C = x.split([e, gn, gn], dim=-1)
    x = x.unflatten(-1, (h, p))
    B, C = (t.unflatten(-1, (ngroups, 1, n)).expand(-1, -1, h // ngroups, -1).flatten(1, 2) for t in (B, C))  # (b h n)
    dt = F.softplus(dt.to(dtype) + dt_bias.to(dtype)).clamp(dt_min, dt_max)
    decay = torch.exp(-torch.exp(A_log.to(dtype)) * dt)[..., None, None]
    S = torch.addcmul(decay * ssm_state.to(dtype), (dt[..., None] * x)[..., None], B[:, :, None])
    y = (S @ C[..., None]).squeeze(-1) + D.to(dtype).reshape(h, -1) * x
    y = y.flatten(1) * F.silu(z.to(dtype))
    if norm_weight is not None:
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * norm_weight.to(dtype)
    return F.linear(y.to(u.dtype), out_proj, out_bias), conv, S
