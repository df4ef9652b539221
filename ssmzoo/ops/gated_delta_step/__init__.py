"""One token through a whole gated delta mixer (Gated DeltaNet, Kimi delta attention), as one operator.

    [qkv, gate, beta, decay] = W_in u;  q, k, v = SiLU(conv over the last k inputs qkv)
    q, k divided by their lengths, q also by sqrt(n);  beta = beta_scale sigmoid(beta)
    g = -exp(A_log) softplus(decay + dt_bias)
    S <- exp(g) S,   S <- S + beta k (v - S^T k)^T,   o = S^T q
    out = W_out (RMSNorm(o) act(gate)),   the norm per head

With f_proj and g_proj (Kimi) decay and gate are bottlenecks of p channels, decay <- W_f decay and gate <- W_g gate + b,
the decay is one per channel of the keys, and act is the sigmoid instead of SiLU.
Letters: b batch, d model width, h heads of v and j of q and k, n and p widths of a key and a value, k taps.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ssmzoo.ops.checks import compute_dtype, expect_one_device
from ssmzoo.ops.dispatch import op

LENGTH_EPS = 1e-6  # under the root of the lengths of q and k


@op(check=expect_one_device)
def gated_delta_step(
    u: Tensor,
    conv_state: Tensor,
    state: Tensor,
    in_proj: Tensor,
    conv_weight: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    out_proj: Tensor,
    f_proj: Tensor | None = None,
    g_proj: Tensor | None = None,
    g_bias: Tensor | None = None,
    num_heads: int = 1,
    beta_scale: float = 1.0,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """Advance a gated delta mixer by one token; the states given are left alone.

    u           (b d)
    conv_state  (b c k), c = 2 j n + h p: the last k inputs of the convolution, oldest first
    state       (b h n p) fp32
    in_proj     (c+hp+2h d), or (c+2p+h d) with bottlenecks; conv_weight (c k)
    A_log       (h); dt_bias (h), or (h n) with bottlenecks
    norm_weight (p); out_proj (d hp); f_proj (hn p); g_proj (hp p), g_bias (hp)
    num_heads   j, a divisor of h
    returns     out (b d), the new conv_state and state

    Sources: Yang et al. 2024 (arXiv 2412.06464), Kimi Linear (arXiv 2510.26692); the mathematics of the sequence form.
    """
    (_, h, n, p), j, dtype = state.shape, num_heads, compute_dtype(u, state)
    c = conv_state.shape[1]
    widths = [c, h * p, h, h] if f_proj is None else [c, p, h, p]
    qkv, gate, beta, decay = F.linear(u, in_proj).split(widths, dim=-1)
    conv = torch.cat([conv_state[..., 1:].to(qkv.dtype), qkv[..., None]], dim=-1)
    qkv = F.silu((conv.to(dtype) * conv_weight.to(dtype)).sum(-1))
    qk, v = qkv.split([2 * j * n, h * p], dim=-1)
    qk = qk.unflatten(-1, (2 * j, n))
    qk = qk * torch.rsqrt(qk.square().sum(-1, keepdim=True) + LENGTH_EPS)
    q, k = qk[:, :, None].expand(-1, -1, h // j, -1).flatten(1, 2).chunk(2, dim=1)  # (b h n)
    if f_proj is not None:
        decay, gate = F.linear(decay, f_proj), F.linear(gate, g_proj, g_bias)
    g = -torch.exp(A_log.to(dtype))[:, None] * F.softplus(decay.to(dtype) + dt_bias.to(dtype)).unflatten(-1, (h, -1))
    S = torch.exp(g)[..., None] * state.to(dtype)  # (b h n p)
    v, beta = v.unflatten(-1, (h, p)), beta_scale * torch.sigmoid(beta.to(dtype))
    error = beta[..., None] * (v - (k[:, :, None] @ S)[:, :, 0])
    S = torch.addcmul(S, k[..., None], error[:, :, None])
    o = n**-0.5 * (q[:, :, None] @ S)[:, :, 0]  # (b h p)
    o = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + eps) * norm_weight.to(dtype)
    gate = gate.to(dtype).unflatten(-1, (h, p))
    y = o * (F.silu(gate) if f_proj is None else torch.sigmoid(gate))
    return F.linear(y.flatten(1).to(u.dtype), out_proj), conv, S
