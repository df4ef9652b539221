"""One token through a whole Mamba-1 mixer: what decoding does most, as one operator.

    [x, z] = W_in u;  x = SiLU(conv over the last k inputs);  [dt, B, C] = W_x x;  dt = softplus(W_dt dt + b_dt)
    h = exp(dt A) h + dt x B;  y = (<h, C> + D x) SiLU(z);  out = W_out y

A step of a small model is a few hundred kilobytes of weights and some forty tiny operations, each costing more to start
than to run; together they are one pass over the weights.
Letters: b batch, d model width, e inner width, n state size, r rank of the time step, k taps.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ssmzoo.ops.checks import compute_dtype, expect_one_device
from ssmzoo.ops.dispatch import op


@op(check=expect_one_device)
def mamba_step(
    u: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    x_proj: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    in_proj: Tensor | None = None,
    in_bias: Tensor | None = None,
    out_proj: Tensor | None = None,
    out_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Advance a Mamba mixer by one token; the states given are left alone.

    u           (b d), or (b 2e) = [x, z] when there is no in_proj
    conv_state  (b e k) the last k inputs of the convolution, oldest first
    ssm_state   (b e n) fp32
    conv_weight (e k), conv_bias (e); x_proj (r+2n e); dt_proj (e r), dt_bias (e); A_log (e n), A = -exp(A_log); D (e)
    in_proj     (2e d), in_bias (2e); out_proj (d e), out_bias (d)
    returns     out (b d), or y (b e) when there is no out_proj; the new conv_state and ssm_state

    Source: Gu & Dao 2023 (arXiv 2312.00752), section 3; the same mathematics as the sequence form.
    """
    n, r = A_log.shape[1], dt_proj.shape[1]
    if in_proj is not None:
        u = F.linear(u, in_proj, in_bias)
    x, z = u.chunk(2, dim=-1)
    conv = torch.cat([conv_state[..., 1:].to(x.dtype), x[..., None]], dim=-1)
    dtype = compute_dtype(u, ssm_state)
    x = (conv.to(dtype) * conv_weight.to(dtype)).sum(-1)
    x = F.silu(x if conv_bias is None else x + conv_bias.to(dtype)).to(u.dtype)
    dt, B, C = F.linear(x, x_proj).split([r, n, n], dim=-1)
    dt = F.softplus(F.linear(dt, dt_proj).to(dtype) + dt_bias.to(dtype))
    decay = torch.exp(dt[..., None] * -torch.exp(A_log.to(dtype)))
    h = torch.addcmul(decay * ssm_state.to(dtype), (dt * x)[..., None], B.to(dtype)[:, None])
    y = torch.bmm(h, C.to(dtype)[..., None]).squeeze(-1)
    y = ((y + D.to(dtype) * x) * F.silu(z.to(dtype))).to(u.dtype)
    return (y if out_proj is None else F.linear(y, out_proj, out_bias)), conv, h
