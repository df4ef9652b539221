"""One token through a whole Mamba-3 mixer of rank 1: what decoding does most, as one operator.

    [z, x, B, C, d, a, t, g] = W_in u;  dt = softplus(d + b_dt);  lam = sigmoid(t)
    f(v) = 1 + v, or 1 / (1 - v) for v < 0
    phase = phase + dt pi tanh(g) mod 2 pi;  k, q = Rot(phase)(RMSNorm(B, C) + biases)
    S = exp(dt min(-f(a), -A_floor)) (S + (1 - lam) dt x' k'^T) + lam dt x k^T          x', k' of the token before
    y = (S q + D x) SiLU(z), or RMSNorm(S q + D x) SiLU(z) per head;  out = W_out y

Letters: b batch, d model width, h heads of p channels, e = h p, n state size, g groups sharing B and C, m angles.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ssmzoo.ops.checks import compute_dtype, expect_one_device
from ssmzoo.ops.dispatch import op


@op(check=expect_one_device)
def mamba3_step(
    u: Tensor,
    phase: Tensor,
    ssm_state: Tensor,
    last_k: Tensor,
    last_x: Tensor,
    in_proj: Tensor,
    dt_bias: Tensor,
    B_norm: Tensor,
    C_norm: Tensor,
    B_bias: Tensor,
    C_bias: Tensor,
    D: Tensor,
    norm_weight: Tensor | None,
    out_proj: Tensor,
    ngroups: int = 1,
    A_floor: float = 1e-4,
    B_eps: float = 1e-5,
    C_eps: float = 1e-5,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Advance a Mamba-3 mixer by one token; the states given are left alone.

    u           (b d)
    phase       (b h m) fp32, radians; ssm_state (b h p n) fp32
    last_k      (b h n) the key of the token before, rotated; last_x (b h p) its value
    in_proj     (2e + 2 g n + 3h + m, d); dt_bias (h)
    B_norm, C_norm  (n) weights of the norms of keys and queries; B_bias, C_bias (h n); D (h)
    norm_weight (e) of the norm per head, before the gate; None: no norm
    out_proj    (d e)
    returns     out (b d), then the new phase, ssm_state, last_k and last_x

    Source: arXiv 2603.15569; the same mathematics as `trapezoidal_scan` and what stands around it.
    """
    (h, p, n), m, dtype = ssm_state.shape[1:], phase.shape[-1], compute_dtype(u, ssm_state)
    sizes = [h * p, h * p, ngroups * n, ngroups * n, h, h, h, m]
    z, x, B, C, dt, a, trap, angle = F.linear(u, in_proj).split(sizes, dim=-1)
    z, v = (t.to(dtype).unflatten(-1, (h, p)) for t in (z, x))
    dt, lam, a = F.softplus(dt.to(dtype) + dt_bias.to(dtype)), torch.sigmoid(trap.to(dtype)), a.to(dtype)
    rate = -torch.where(a >= 0, 1 + a, 1 / (1 - a.clamp(max=0)))
    decay = torch.exp(dt * rate.clamp(max=-A_floor))[..., None, None]
    phase = (phase + dt[..., None] * (math.pi * torch.tanh(angle.to(dtype)))[:, None]) % (2 * math.pi)  # (b h m)

    def rotated(t: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """(b gn) -> (b h n): normalised, one for each head, biased, neighbouring channels rotated."""
        t = F.rms_norm(t.to(dtype).unflatten(-1, (ngroups, n)), (n,), weight.to(dtype), eps)
        t = t.repeat_interleave(h // ngroups, dim=1) + bias.to(dtype)
        even, odd = t[..., : 2 * m].unflatten(-1, (m, 2)).unbind(-1)
        cos, sin = phase.cos(), phase.sin()
        pairs = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)
        return torch.cat([pairs, t[..., 2 * m :]], dim=-1)

    k, q = rotated(B, B_norm, B_bias, B_eps), rotated(C, C_norm, C_bias, C_eps)
    before = ((1 - lam) * dt)[..., None, None] * last_x.to(dtype)[..., None] * last_k.to(dtype)[:, :, None]
    S = decay * (ssm_state.to(dtype) + before) + (lam * dt)[..., None, None] * v[..., None] * k[:, :, None]
    y = (S @ q[..., None]).squeeze(-1) + D.to(dtype)[:, None] * v
    if norm_weight is not None:
        y = F.rms_norm(y, (p,), None, eps) * norm_weight.to(dtype).reshape(h, p)
    y = (y * F.silu(z)).flatten(1)
    return F.linear(y.to(u.dtype), out_proj), phase, S, k.to(last_k.dtype), v.to(last_x.dtype)
