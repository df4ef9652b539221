"""Attention whose mask is computed from the values: every key tells how much it wants to be seen.

    q, k, v = W_q u, W_k u, W_v u per head, q and k rotated;   m_s = exp(A softplus(W_dt v_s)) (h) per key
    y_t = W_o concat_heads( softmax_s(q_t k_s / sqrt(p) + m_s, over s <= t of the same document) v )

With a `mask_ratio` of r, the keys with the smallest m are hidden: with n keys, those strictly below the floor(r n)-th
smallest m. Which n keys is `mask_over`: "past", those that the query sees (causal, the default); "all", those of the
whole sequence as published, later ones too, which leaks the future and makes decoding differ from training.

b batch, l length, s keys, d width, h heads, j key/value heads, p width of a head.
Source: Wonderful Matrices (arXiv 2412.11834); LoserCheems/WonderfulMatrices (Apache-2.0) for names.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssmzoo.layers.mixers.attention import kv_bytes, positions, remembered, visible
from ssmzoo.layers.norm import fp32
from ssmzoo.layers.program import Builder
from ssmzoo.layers.rope import rope_table
from ssmzoo.layers.state import Padding, call_aligned, itemsize
from ssmzoo.models.cheems_layers.rotary_ssd import head_width
from ssmzoo.ops.rotary import rotate
from ssmzoo.ops.token_step import Register
from ssmzoo.ops.transforms import scaled_dot_product_attention
from ssmzoo.suggest import nearest

MASK_OVER = ("past", "all")


class DynamicMaskState(NamedTuple):
    k: Tensor  # (b s j p) rotated by its position already
    v: Tensor  # (b s j p)
    position: Tensor  # (b s) position in its document, -1 for keys that no later token may see
    m: Tensor  # (b s h) fp32


class DynamicMaskAttention(nn.Module):
    """Causal mixer (b l d) -> (b l d) whose state grows with the sequence.

    n_heads, n_kv_heads   h, which must divide d into heads of even width, and j (default h), which must divide h
    mask_ratio            r, in [0, 1); 0: no key is hidden
    mask_over             "past" or "all", see above
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        n_kv_heads: int | None = None,
        mask_ratio: float = 0.0,
        mask_over: str = "past",
        rope_base: float = 10000.0,
        bias: bool = False,
    ):
        super().__init__()
        self.d_head, self.rope_base = head_width(d_model, n_heads), rope_base
        n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        if n_kv_heads < 1 or n_heads % n_kv_heads:
            raise ValueError(f"n_kv_heads = {n_kv_heads} must divide n_heads = {n_heads}")
        if not 0 <= mask_ratio < 1:
            raise ValueError(f"mask_ratio = {mask_ratio} must lie in [0, 1): the share of the keys that is hidden")
        if mask_over not in MASK_OVER:
            raise ValueError(f"mask_over is {mask_over!r}{nearest(str(mask_over), MASK_OVER)}; choose past or all")
        self.mask_ratio, self.mask_over = mask_ratio, mask_over
        kv = n_kv_heads * self.d_head
        self.q_proj = nn.Linear(d_model, d_model, bias=bias)
        self.k_proj = nn.Linear(d_model, kv, bias=bias)
        self.v_proj = nn.Linear(d_model, kv, bias=bias)
        self.dt_proj = nn.Linear(kv, n_heads, bias=bias)
        self.A = nn.Parameter(torch.ones(n_heads))
        self.o_proj = nn.Linear(d_model, d_model, bias=bias)

    def forward(
        self,
        x: Tensor,
        state: DynamicMaskState | None = None,
        *,
        mask: Tensor | Padding | None = None,
        seq_idx: Tensor | None = None,
        prefix: Tensor | None = None,
    ) -> tuple[Tensor, DynamicMaskState]:
        if isinstance(mask, Tensor):
            return call_aligned(self.forward, x, state, mask, seq_idx, prefix=prefix)
        if state is not None and self.mask_ratio and self.mask_over == "all":
            raise ValueError(
                "mask_over='all' compares all keys at once, so it cannot continue from a state; use 'past'"
            )
        position, document = positions(*x.shape[:2], x.device, state, seq_idx)
        cos, sin = (t[:, :, None] for t in rope_table(position, self.d_head, self.rope_base, x.dtype))
        v = self.v_proj(x)  # (b l jp)
        m = torch.exp(fp32(self.A) * F.softplus(fp32(self.dt_proj(v))))  # (b l h)
        q, k, v = (
            t.unflatten(-1, (-1, self.d_head)) for t in (self.q_proj(x), self.k_proj(x), v)
        )  # (b l h p), (b l j p)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        plain = state is None and mask is None and seq_idx is None and prefix is None  # a causal kernel needs no mask
        allowed = None if plain and not self.mask_ratio else visible(position, document, state, mask, prefix)
        if state is not None:
            k, v, m = (
                torch.cat([old.to(new.dtype), new], dim=1) for old, new in zip((state.k, state.v, state.m), (k, v, m))
            )
        if self.mask_ratio:
            bias = self.bias(m, allowed, q.dtype)
            q, keys, values = (t.transpose(1, 2) for t in (q, k, v))
            y = scaled_dot_product_attention(q, keys, values, attn_mask=bias, enable_gqa=q.shape[1] != keys.shape[1])
            y = y.transpose(1, 2)
        else:
            y = attend_with_bias(q, k, v, m, allowed)
        state = DynamicMaskState(k, v, remembered(position, document, state, mask), m)
        return self.o_proj(y.flatten(2)), state

    def program(self, p: Builder, x: Register) -> Register:
        p.need(not self.mask_ratio)
        d, h = self.d_head, len(self.A)
        q, k, v = (p.linear(m, x) for m in (self.q_proj, self.k_proj, self.v_proj))
        bias = p.linear(self.dt_proj, v), self.A
        y = p.attend(q, k, v, (h, k.size // d, d), (d,) * 3, (d, self.rope_base), bias=bias)
        return p.linear(self.o_proj, y)

    def state_bytes(self, length: int) -> int:
        return kv_bytes(self, length, self.k_proj.out_features) + length * len(self.A) * itemsize(self)[1]

    def bias(self, m: Tensor, allowed: Tensor, dtype: torch.dtype) -> Tensor:
        """What is added to the scores: m (b s h), allowed (b 1 l s) -> (b h l s).

        Hidden keys get the most negative number instead of -inf, as released: a query all of whose keys are hidden
        (only with mask_over="all") reads the mean of all values.
        """
        m = m.transpose(1, 2)[:, :, None]  # (b h 1 s)
        if self.mask_ratio:
            allowed = allowed & (m >= self.threshold(m.detach(), allowed))
        return torch.where(allowed, m.to(dtype), torch.finfo(dtype).min)

    def threshold(self, m: Tensor, allowed: Tensor) -> Tensor:
        """The smallest m that is still seen: (b h l 1), or (b h 1 1) over all keys."""
        if self.mask_over == "past":
            m = m.masked_fill(~allowed, torch.inf)  # (b h l s)
            n = allowed.sum(-1, keepdim=True)
        else:
            n = torch.tensor(m.shape[-1], device=m.device).expand(1, 1, 1, 1)
        k = (n * self.mask_ratio).long()
        smallest = m.sort(dim=-1).values
        kth = smallest.gather(-1, (k - 1).clamp(min=0).expand(*smallest.shape[:-1], 1))
        return kth.masked_fill(k == 0, -torch.inf)


def attend_with_bias(q: Tensor, k: Tensor, v: Tensor, m: Tensor, allowed: Tensor | None) -> Tensor:
    """softmax(q k / sqrt(p) + m) v: q (b l h p), k and v (b s j p), m (b s h), allowed (b 1 l s), None: causal.

    m stands as a channel of the keys that every query reads with weight 1, so that torch's kernel needs no matrix of
    biases (b h l s), nor its gradient. Values get a channel of zeros, since the kernel wants equal widths.
    """
    h, p = q.shape[2:]
    if k.shape[2] != h:
        k, v = (t.repeat_interleave(h // t.shape[2], dim=2) for t in (k, v))
    q, v = F.pad(q, (0, 1), value=p**0.5), F.pad(v, (0, 1))
    k = torch.cat([k, m[..., None].to(k.dtype)], dim=-1)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    y = scaled_dot_product_attention(q, k, v, attn_mask=allowed, is_causal=allowed is None, scale=p**-0.5)
    return y.transpose(1, 2)[..., :p]
