"""Lightning attention: linear attention whose heads forget at fixed rates.

    q, k, v = SiLU(W x) per head (rows of one head in turn)
    S_t = exp(-s_h) S_{t-1} + k_t v_t^T          o_t = S_t^T q_t
    y = W_o ( sigmoid(W_g x) RMSNorm(o) )                                    one norm over all heads
    s_h = 2^(-8 h / H) (1 - i / (L - 1) + 1e-5),  h = 1 .. H, layer i = 0 .. L - 1

The first layer forgets fastest and the last one hardly at all. There are no positions, no denominator and no scale. The
recurrence is the scan of Mamba-2 with a constant decay, a group per head, and nothing new is computed here.

b batch, l length, d width, h heads of p channels.
Source: MiniMax-01 (arXiv 2501.08313); transformers models/minimax (Apache-2.0). Three laws of the slopes s_h are in
circulation; this is MiniMax's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssmzoo.layers.norm import GatedRMSNorm
from ssmzoo.layers.program import Builder
from ssmzoo.layers.state import Padding, call_aligned, is_step, itemsize
from ssmzoo.ops import ssd_scan, ssd_state_update
from ssmzoo.ops.token_step import Register


class LightningState(NamedTuple):
    S: Tensor  # (b h p p) fp32: value by key


class LightningAttention(nn.Module):
    """Causal mixer (b l d) -> (b l d).

    num_heads, head_dim   h and p (default d / h)
    layer, n_layer        i and L: the number of this layer, attention layers counted, and of all; they set the slopes
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        head_dim: int | None = None,
        layer: int = 0,
        n_layer: int = 1,
        norm_eps: float = 1e-6,
    ):
        super().__init__()
        if num_heads < 1 or (head_dim is None and d_model % num_heads):
            raise ValueError(f"num_heads must divide d_model, got {num_heads} and {d_model}; or give head_dim")
        if not 0 <= layer < n_layer:
            raise ValueError(f"layer = {layer} must lie in 0..{n_layer - 1}, the layers of the model")
        self.heads, self.p = num_heads, head_dim or d_model // num_heads
        width = self.heads * self.p
        self.in_proj = nn.Linear(d_model, 3 * width, bias=False)
        self.gate = nn.Linear(d_model, width, bias=False)
        self.norm = GatedRMSNorm(width, norm_eps, norm_before_gate=True, activation="sigmoid")
        self.out_proj = nn.Linear(width, d_model, bias=False)
        self.register_buffer("slopes", slopes(num_heads, layer, n_layer), persistent=False)

    def forward(
        self,
        x: Tensor,
        state: LightningState | None = None,
        *,
        mask: Tensor | Padding | None = None,
        seq_idx: Tensor | None = None,
    ) -> tuple[Tensor, LightningState]:
        if isinstance(mask, Tensor):
            return call_aligned(self.forward, x, state, mask, seq_idx)
        q, k, v = F.silu(self.in_proj(x)).unflatten(-1, (self.heads, 3 * self.p)).chunk(3, dim=-1)  # (b l h p)
        a = -self.slopes.expand(*x.shape[:2], -1)  # (b l h)
        if mask is not None:  # no decay, no input
            a, v = a * mask.mask[..., None], v * mask.mask[..., None, None]
        if is_step(x, state, mask, seq_idx):
            S = state.S.clone()  # the caller keeps the state it passed in
            y = ssd_state_update(S, v[:, 0], torch.ones_like(a[:, 0]), -self.slopes, k[:, 0], q[:, 0])[:, None]
        else:
            y, S = ssd_scan(v, a, k, q, None if state is None else state.S, seq_idx)
        y = self.norm(y.flatten(2), self.gate(x))
        return self.out_proj(y if mask is None else y * mask.mask[..., None]), LightningState(S)

    def program(self, p: Builder, x: Register) -> Register:
        h, d = self.heads, self.p
        qkv = p.linear(self.in_proj, x, "silu")  # h times [q, k, v]
        q, k, v = (qkv.part(i * d, qkv.size - 2 * d) for i in range(3))
        y = p.ssd(v, k, q, (h, d, d), (3 * d,) * 3, self.slopes, (p.state(h, d, d),))
        return p.linear(self.out_proj, p.gated_norm(self.norm, y, p.linear(self.gate, x)))

    def state_bytes(self, length: int) -> int:
        return self.heads * self.p**2 * itemsize(self)[1]


def slopes(heads: int, layer: int, n_layer: int) -> Tensor:
    """(h) fp32, positive: how much each head of a layer forgets per token."""
    rate = 2.0 ** (-8 * torch.arange(1, heads + 1, dtype=torch.float32) / heads)
    return rate * (1 - layer / max(1, n_layer - 1) + 1e-5)
