"""Multi-head attention as a causal mixer with carried state, in the form that Mamba hybrids use it.

    [q, k, v, (up, gate)] = W_in u;  qkv = causal depthwise conv_k(qkv), no activation;  rotary on q and k
    out = W_out [softmax(q k^T scale) v, up SiLU(gate)]

b batch, l length, s length of the memory, h heads, j key/value heads, i head width.
The released implementation decodes this layer wrongly (its convolution cache holds outputs, and one query sees key 0
only); here carried state gives what the whole sequence gives.
Source: state-spaces/mamba modules/mha.py (Apache-2.0) for names and layout.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssmzoo.layers.embed import rope_angles, rotate_halves
from ssmzoo.layers.state import Padding, call_aligned, conv_history, conv_window
from ssmzoo.ops import causal_conv1d_fn
from ssmzoo.ops.transforms import scaled_dot_product_attention


class MHAState(NamedTuple):
    conv: Tensor | None  # (b c k) the last inputs of the convolution
    k: Tensor  # (b s j i) rotated keys
    v: Tensor  # (b s j i)
    visible: Tensor  # (b s) bool, False for padding and for documents that have ended
    position: Tensor  # (b) tokens seen


class MHA(nn.Module):
    """Causal mixer (b l d) -> (b l d); its state grows with the sequence.

    embed_dim, num_heads, num_heads_kv, head_dim   d, h, j (default h; must divide h), i (default d / h)
    mlp_dim              width of the gated MLP beside the attention, up and gate together, rounded up to 256; 0: none
    d_conv               taps of the convolution over q, k and v; 0: none
    rotary_emb_dim       channels of each head that rotate; 0: no positions
    softmax_scale        default 1 / sqrt(i)
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_heads_kv: int | None = None,
        head_dim: int | None = None,
        mlp_dim: int = 0,
        qkv_proj_bias: bool = True,
        out_proj_bias: bool = True,
        softmax_scale: float | None = None,
        d_conv: int = 0,
        rotary_emb_dim: int = 0,
        rotary_emb_base: float = 10000.0,
    ):
        super().__init__()
        self.num_heads, self.num_heads_kv = num_heads, num_heads_kv or num_heads
        if num_heads < 1 or num_heads % self.num_heads_kv:
            raise ValueError(f"num_heads_kv must divide num_heads, got {num_heads_kv} and {num_heads}")
        if head_dim is None and embed_dim % num_heads:
            raise ValueError(f"num_heads must divide embed_dim, got {num_heads} and {embed_dim}; or give head_dim")
        self.head_dim = head_dim or embed_dim // num_heads
        if rotary_emb_dim % 2 or not 0 <= rotary_emb_dim <= self.head_dim:
            raise ValueError(f"rotary_emb_dim must be even and at most head_dim={self.head_dim}, got {rotary_emb_dim}")
        self.mlp_dim, self.d_conv = -(-mlp_dim // 256) * 256, d_conv
        self.softmax_scale = softmax_scale
        self.rotary_emb_dim, self.rotary_emb_base = rotary_emb_dim, rotary_emb_base
        self.qkv_dim = self.head_dim * (num_heads + 2 * self.num_heads_kv)
        out_dim = self.head_dim * num_heads
        self.in_proj = nn.Linear(embed_dim, self.qkv_dim + self.mlp_dim, bias=qkv_proj_bias)
        if d_conv:
            self.conv1d = nn.Conv1d(self.qkv_dim, self.qkv_dim, d_conv, groups=self.qkv_dim)
        self.out_proj = nn.Linear(out_dim + self.mlp_dim // 2, embed_dim, bias=out_proj_bias)

    def forward(
        self,
        x: Tensor,
        state: MHAState | None = None,
        *,
        mask: Tensor | Padding | None = None,
        seq_idx: Tensor | None = None,
    ) -> tuple[Tensor, MHAState]:
        if isinstance(mask, Tensor):
            return call_aligned(self.forward, x, state, mask, seq_idx)
        qkv, mlp = self.in_proj(x).split([self.qkv_dim, self.mlp_dim], dim=-1)
        qkv, conv = self._conv(qkv, state, mask, seq_idx)
        q, k, v = qkv.unflatten(-1, (-1, self.head_dim)).split(
            [self.num_heads, self.num_heads_kv, self.num_heads_kv], dim=2
        )  # (b l h i), (b l j i), (b l j i)
        b, l = x.shape[:2]
        start = torch.zeros(b, dtype=torch.long, device=x.device) if state is None else state.position
        if self.rotary_emb_dim:
            angles = rope_angles(
                start[:, None] + torch.arange(l, device=x.device), self.rotary_emb_dim, self.rotary_emb_base
            )[:, :, None]
            q, k = rotate_halves(q, angles), rotate_halves(k, angles)
        if state is not None:
            k, v = torch.cat([state.k, k], dim=1), torch.cat([state.v, v], dim=1)
        pairs, visible = self._who_sees_whom(b, l, state, mask, seq_idx, x.device)
        y = scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=pairs,
            is_causal=pairs is None,
            scale=self.softmax_scale,
            enable_gqa=self.num_heads != self.num_heads_kv,
        )
        y = y.transpose(1, 2).flatten(2)
        if self.mlp_dim:
            up, gate = mlp.chunk(2, dim=-1)
            y = torch.cat([y, up * F.silu(gate)], dim=-1)
        if mask is not None:
            y = y * mask.mask[..., None]
        seen = l if mask is None else mask.lengths
        return self.out_proj(y), MHAState(conv, k, v, visible, start + seen)

    def _conv(self, qkv: Tensor, state, padding, seq_idx) -> tuple[Tensor, Tensor | None]:
        if not self.d_conv:
            return qkv, None
        qkv, past = qkv.transpose(1, 2), None if state is None else state.conv
        window = conv_window(qkv, past, self.d_conv, padding, seq_idx)
        qkv = causal_conv1d_fn(
            qkv,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            seq_idx=seq_idx,
            initial_states=conv_history(past, self.d_conv),
        )
        return qkv.transpose(1, 2), window

    @staticmethod
    def _who_sees_whom(b, l, state, padding, seq_idx, device) -> tuple[Tensor | None, Tensor]:
        """(b 1 l s) bool for attention, None when it is plainly causal; and which keys the next call may see (b s)."""
        now = torch.ones(b, l, dtype=torch.bool, device=device) if padding is None else padding.mask
        before = now[:, :0] if state is None else state.visible
        if state is None and padding is None and seq_idx is None:
            return None, now
        causal = torch.ones(l, l, dtype=torch.bool, device=device).tril().expand(b, l, l)
        past = before[:, None].expand(b, l, -1)
        if seq_idx is not None:  # documents are numbered by their boundaries; the memory belongs to number 0
            number = F.pad((seq_idx[:, 1:] != seq_idx[:, :-1]).long(), (1, 0)).cumsum(1)
            causal = causal & (number[:, :, None] == number[:, None])
            past = past & (number == 0)[:, :, None]
            before, now = before & (number[:, -1:] == 0), now & (number == number[:, -1:])
        return torch.cat([past, causal], dim=2)[:, None], torch.cat([before, now], dim=1)
