"""Causal attention to a window of the last keys, in time and memory linear in the length; it carries one window.

    q, k, v = split(W_qkv x) per head;   q, k rotated by their position in the document
    y = W_out concat_heads( softmax(q k^T / sqrt(p), over t - window < s <= t of the same document) v )

Long inputs are cut into blocks of queries, each of which meets its own keys and those of the block before.

b batch, l length, s keys, d width, h heads of p channels, n blocks of m queries, w window.
Source: HazyResearch/based based/models/mixers/slide_attention.py (Apache-2.0) for names; it halves the number that it
calls window_size: there 256 means 128 keys before the token itself, a window of 129 here.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssmzoo.layers.mixers.attention import KVState, kv_bytes, positions, remembered, rotated, with_old
from ssmzoo.layers.program import Builder
from ssmzoo.layers.state import Padding, call_aligned
from ssmzoo.ops.token_step import Register
from ssmzoo.ops.transforms import scaled_dot_product_attention


class SlidingAttention(nn.Module):
    """Causal mixer (b l d) -> (b l d) whose state is the last window - 1 keys and values.

    n_heads    must divide d_model, with rotary positions into heads of even width
    window     keys that a token sees, itself among them
    rope       whether queries and keys rotate by their positions, over the whole width of a head
    bias       of both projections
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        window: int = 129,
        rope: bool = True,
        rope_base: float = 10000.0,
        bias: bool = False,
    ):
        super().__init__()
        if window < 1:
            raise ValueError(f"window = {window}; it must be at least 1: the token itself and window - 1 before it")
        if n_heads < 1 or d_model % n_heads or (rope and d_model // n_heads % 2):
            even = " of even width, for rotary positions" if rope else ""
            raise ValueError(f"n_heads = {n_heads} does not cut d_model = {d_model} into heads{even}")
        self.n_heads, self.d_head, self.window = n_heads, d_model // n_heads, window
        self.rope, self.rope_base = rope, rope_base
        self.Wqkv = nn.Linear(d_model, 3 * d_model, bias=bias)
        self.out_proj = nn.Linear(d_model, d_model, bias=bias)

    def forward(
        self,
        x: Tensor,
        state: KVState | None = None,
        *,
        mask: Tensor | Padding | None = None,
        seq_idx: Tensor | None = None,
        prefix: Tensor | None = None,
    ) -> tuple[Tensor, KVState]:
        """`prefix` is accepted and changes nothing: the window lies before each token, within a prefix as well."""
        if isinstance(mask, Tensor):
            return call_aligned(self.forward, x, state, mask, seq_idx)
        q, k, v = self.Wqkv(x).unflatten(-1, (3, self.n_heads, self.d_head)).unbind(2)  # (b l h p)
        position, document = positions(*x.shape[:2], x.device, state, seq_idx)
        if self.rope:
            q, k = rotated(q, k, position, self.d_head, self.rope_base)
        if x.shape[1] == 1 and state is not None and mask is None:
            y, state = self.one_more(q, k, v, position, state)
            return self.out_proj(y), state
        kept = remembered(position, document, state, mask)
        if mask is not None:  # every padding slot is a document of its own, that sees itself
            document = torch.where(mask.mask, document, -2 - torch.arange(x.shape[1], device=x.device))
        old = (position[:, :0], document[:, :0])  # positions and documents (b s) of the keys before
        if state is not None:
            old = state.position, torch.where(state.position < 0, -1, 0)
        k, v = with_old(k, v, state)
        y = attend_in_window(q, k, v, (position, document), old, self.window)
        simple = mask is None and seq_idx is None
        return self.out_proj(y.flatten(2)), newest(k, v, kept, max(1, self.window - 1), simple)

    def one_more(self, q: Tensor, k: Tensor, v: Tensor, position: Tensor, state: KVState) -> tuple[Tensor, KVState]:
        """A single token (b 1 h p) at position (b 1) of the open document -> (b 1 hp), state."""
        k, v = with_old(k, v, state)
        at = torch.cat([state.position, position], dim=1)  # (b s)
        allowed = (at >= 0) & (at > position - self.window)
        y = scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), attn_mask=allowed[:, None, None])
        return y.transpose(1, 2).flatten(2), newest(k, v, at, max(1, self.window - 1), True)

    def program(self, p: Builder, x: Register) -> Register:
        h, d = self.n_heads, self.d_head
        q, k, v = p.linear(self.Wqkv, x).split(h * d, h * d, h * d)
        rope = (d, self.rope_base) if self.rope else (0, 1.0)
        return p.linear(self.out_proj, p.attend(q, k, v, (h, h, d), (d,) * 3, rope, window=self.window))

    def state_bytes(self, length: int) -> int:
        return kv_bytes(self, min(length, max(1, self.window - 1)), self.n_heads * self.d_head)


def attend_in_window(
    q: Tensor, k: Tensor, v: Tensor, new: tuple[Tensor, Tensor], old: tuple[Tensor, Tensor], window: int
) -> Tensor:
    """q (b l h p), k and v (b s+l h p) old ones first, (position, document) of the new (b l) and the old (b s) tokens
    -> (b l h p). A token sees its own document, `window` positions back from itself."""
    l, before = q.shape[1], old[0].shape[1]
    m = max(64, window - 1, before)  # a block sees the one before it
    if l <= m:
        allowed = in_window(new, tuple(torch.cat([o, n], dim=1) for o, n in zip(old, new)), window)
        y = scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), attn_mask=allowed[:, None])
        return y.transpose(1, 2)
    rest = -l % m

    def blocks(t: Tensor) -> Tensor:  # (b m+l+rest ...) -> (b n ... 2m)
        return t.unfold(1, 2 * m, m)

    def padded(t: Tensor, front: int, value: int = 0) -> Tensor:
        return F.pad(t, (0, 0) * (t.ndim - 2) + (front, rest), value=value)

    q, k, v = padded(q, 0), padded(k, m - before), padded(v, m - before)
    keys = [padded(torch.cat([o, n], dim=1), m - before, -1) for o, n in zip(old, new)]  # document -1: nobody's
    queries = [padded(n, 0, 0).unflatten(1, (-1, m)).flatten(0, 1) for n in new]  # (bn m)
    allowed = in_window(queries, [blocks(t).flatten(0, 1) for t in keys], window)
    allowed = allowed | ~allowed.any(-1, keepdim=True)  # slots behind the end see anything; they are cut off
    y = scaled_dot_product_attention(
        q.unflatten(1, (-1, m)).flatten(0, 1).transpose(1, 2),  # (bn h m p)
        *(blocks(t).flatten(0, 1).transpose(2, 3) for t in (k, v)),  # (bn h 2m p)
        attn_mask=allowed[:, None],
    )
    return y.transpose(1, 2).unflatten(0, (len(new[0]), -1)).flatten(1, 2)[:, :l]


def in_window(queries, keys, window: int) -> Tensor:
    """(position, document) of queries (b l) and keys (b s) -> (b l s) bool."""
    distance = queries[0][:, :, None] - keys[0][:, None]
    return (queries[1][:, :, None] == keys[1][:, None]) & (distance >= 0) & (distance < window)


def newest(k: Tensor, v: Tensor, position: Tensor, count: int, simple: bool) -> KVState:
    """The `count` keys and values (b s h p) of the highest positions (b s); simple: those at the end."""
    count = min(count, position.shape[1])
    if simple:
        return KVState(*(t[:, -count:].clone() for t in (k, v, position)))
    position, index = (t.flip(1) for t in position.topk(count, dim=1))  # in order, so that the oldest stand in front
    index = index[..., None, None].expand(-1, -1, *k.shape[2:])
    return KVState(k.gather(1, index), v.gather(1, index), position)
