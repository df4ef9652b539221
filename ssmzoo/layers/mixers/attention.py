"""Causal multi-head attention with rotary positions, carrying its keys and values from chunk to chunk.

    q, k, v = split(W_qkv x) per head;   q, k turned by their position
    y = W_o concat_heads( softmax(q k^T / sqrt(p), over s <= t of the same document) v )

b batch, l length, s keys (old and new), d width, h heads, p width of a head.
Source: llm-random (Apache-2.0), lizrd/core/llm.py (AttentionRoPE): rows of W_qkv laid out per head as [q | k | v].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssmzoo.layers.init import truncated_normal_
from ssmzoo.layers.state import Padding, call_aligned
from ssmzoo.ops.transforms import scaled_dot_product_attention


class KVState(NamedTuple):
    k: Tensor  # (b s h p) turned by its position already
    v: Tensor  # (b s h p)
    position: Tensor  # (b s) place in its document, -1 for keys that no later token may see


class Attention(nn.Module):
    """Causal mixer (b l d) -> (b l d) whose state grows with the sequence.

    n_heads     must divide d_model into heads of even width
    rope_base   base of the rotary frequencies; positions start at 0 in every document
    bias        of both projections
    init_scale  projections are truncated normal (`truncated_normal_`), biases zero
    d_head      width of a head when it is not d_model / n_heads
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        rope_base: float = 10000.0,
        bias: bool = False,
        init_scale: float = 0.1,
        d_head: int | None = None,
    ):
        super().__init__()
        if min(d_model, n_heads, 1 if d_head is None else d_head) < 1:
            raise ValueError(f"Attention needs positive sizes, got {d_model=}, {n_heads=}, {d_head=}")
        if d_head is None and d_model % n_heads:
            fitting = [h for h in range(1, d_model + 1) if d_model % (2 * h) == 0]
            near = sorted(sorted(fitting, key=lambda h: abs(h - n_heads))[:3])
            raise ValueError(f"d_model = {d_model} is not divisible by n_heads = {n_heads}; choose one of {near}")
        self.n_heads, self.rope_base, self.init_scale = n_heads, rope_base, init_scale
        self.d_head = d_head or d_model // n_heads
        if self.d_head % 2:
            raise ValueError(
                f"rotary positions need heads of even width, got {self.d_head} (d_model = {d_model}, "
                f"n_heads = {n_heads})"
            )
        self.input_projection = nn.Linear(d_model, 3 * n_heads * self.d_head, bias=bias)
        self.output_projection = nn.Linear(n_heads * self.d_head, d_model, bias=bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for linear in (self.input_projection, self.output_projection):
            truncated_normal_(linear.weight, linear.in_features, self.init_scale)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def forward(
        self,
        x: Tensor,
        state: KVState | None = None,
        *,
        mask: Tensor | Padding | None = None,
        seq_idx: Tensor | None = None,
    ) -> tuple[Tensor, KVState]:
        if isinstance(mask, Tensor):
            return call_aligned(self.forward, x, state, mask, seq_idx)
        b, l, _ = x.shape
        position, document = positions(b, l, x.device, state, seq_idx)
        q, k, v = self.input_projection(x).view(b, l, self.n_heads, 3 * self.d_head).chunk(3, dim=-1)  # (b l h p)
        cos, sin = rope_table(position, self.d_head, self.rope_base, x.dtype)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        plain = state is None and mask is None and seq_idx is None  # then a causal kernel needs no mask at all
        allowed = None if plain else visible(position, document, state, mask)
        if state is not None:
            k, v = torch.cat([state.k.to(k.dtype), k], dim=1), torch.cat([state.v.to(v.dtype), v], dim=1)
        y = scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=allowed, is_causal=plain
        )
        y = self.output_projection(y.transpose(1, 2).flatten(2))
        return y, KVState(k, v, remembered(position, document, state, mask))


def positions(b: int, l: int, device, state: KVState | None, seq_idx: Tensor | None) -> tuple[Tensor, Tensor]:
    """(b l): place of every token in its document, and the document's number in the chunk (0 continues the state)."""
    slot = torch.arange(l, device=device).expand(b, l)
    done = 0 if state is None else state.position.amax(1, keepdim=True) + 1  # (b 1) tokens of the open document
    if seq_idx is None:
        return slot + done, torch.zeros_like(slot)
    new = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))
    document = new.cumsum(1)
    start = torch.where(new, slot, 0).cummax(1).values
    return torch.where(document == 0, slot + done, slot - start), document


def visible(position: Tensor, document: Tensor, state: KVState | None, padding: Padding | None) -> Tensor:
    """Which keys (old, then new) every new token may see: (b 1 l s) bool. A token always sees itself, so that padding
    has something to attend to."""
    l = position.shape[1]
    allowed = (document[:, :, None] == document[:, None, :]).tril()
    if padding is not None:
        itself = torch.eye(l, dtype=torch.bool, device=position.device)
        allowed = allowed & padding.mask[:, None, :] | itself
    if state is not None:
        old = (document[:, :, None] == 0) & (state.position >= 0)[:, None, :]
        allowed = torch.cat([old, allowed], dim=2)
    return allowed[:, None]


def remembered(position: Tensor, document: Tensor, state: KVState | None, padding: Padding | None) -> Tensor:
    """Positions to keep in the state: those of the last document's real tokens; -1 elsewhere. (b s)"""
    last = document[:, -1:]
    keep = document == last if padding is None else (document == last) & padding.mask
    position = torch.where(keep, position, -1)
    if state is None:
        return position
    return torch.cat([torch.where(last == 0, state.position, -1), position], dim=1)


def rope_table(position: Tensor, width: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin (b l 1 width/2) of position / base^(2 i / width), at least in fp32."""
    wide = torch.promote_types(dtype, torch.float32)
    frequency = base ** (-torch.arange(0, width, 2, device=position.device, dtype=wide) / width)
    angle = (position.to(wide)[..., None] * frequency)[:, :, None]
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (channel i, channel i + width/2) of x (b l h width) by their angle; same dtype."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)
