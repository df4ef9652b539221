"""Causal multi-head attention with rotary positions, carrying its keys and values from chunk to chunk.

    q, k, v = split(W_in x) per head;   q, k rotated by their position in the document
    y = W_out concat_heads( softmax(scale q k^T, over s <= t of the same document) v )

A prefix is read in both directions: its tokens attend to all of it. `attend` is the one implementation; around it stand
two layers whose projections follow two families of checkpoints: `Attention` (llm-random: rows of W_in per head as
[q | k | v]) and `MHA` (Mamba hybrids: [all q | all k | all v], a short convolution over them, a gated MLP beside).

b batch, l length, s keys (old and new), d width, h heads, j key/value heads, p width of a head.
Source: llm-random lizrd/core/llm.py (AttentionRoPE), state-spaces/mamba modules/mha.py (both Apache-2.0) for names and
layouts. The released MHA decodes wrongly (its convolution cache holds outputs, and one query sees key 0 only); here
carried state gives what the whole sequence gives.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssmzoo.layers.init import truncated_normal_
from ssmzoo.layers.mixers.short_conv import short_conv
from ssmzoo.layers.position import document_positions
from ssmzoo.layers.program import Builder
from ssmzoo.layers.rope import rope_table
from ssmzoo.layers.state import Padding, call_aligned, inside_prefix, itemsize
from ssmzoo.ops.rotary import rotate
from ssmzoo.ops.token_step import Register
from ssmzoo.ops.transforms import scaled_dot_product_attention


class KVState(NamedTuple):
    k: Tensor  # (b s j p) rotated by its position already
    v: Tensor  # (b s j p)
    position: Tensor  # (b s) position in its document, -1 for keys that no later token may see
    conv: Tensor | None = None  # (b c k) the last inputs of a short convolution before the attention


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: KVState | None,
    *,
    mask: Padding | None = None,
    seq_idx: Tensor | None = None,
    prefix: Tensor | None = None,
    rope_dim: int = 0,
    rope_base: float = 10000.0,
    scale: float | None = None,
) -> tuple[Tensor, KVState]:
    """q (b l h p), k and v (b l j p), not yet rotated -> y (b l hp), state.

    rope_dim   channels of each head that rotate; 0: no positions | scale: default 1 / sqrt(p)
    prefix     (b) leading positions that see each other in both directions, or (b l) bool of packed documents
    """
    b, l = q.shape[:2]
    position, document = positions(b, l, q.device, state, seq_idx)
    if rope_dim:
        q, k = rotated(q, k, position, rope_dim, rope_base)
    plain = state is None and mask is None and seq_idx is None and prefix is None  # a causal kernel needs no mask
    allowed = None if plain else visible(position, document, state, mask, prefix)
    k, v = with_old(k, v, state)
    y = scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=allowed,
        is_causal=plain,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return y.transpose(1, 2).flatten(2), KVState(k, v, remembered(position, document, state, mask))


class Attention(nn.Module):
    """Causal mixer (b l d) -> (b l d) whose state grows with the sequence.

    n_heads     must divide d_model into heads of even width
    rope_base   base of the rotary frequencies; positions start at 0 in every document
    bias        of both projections
    init_scale  projections are truncated normal (`truncated_normal_`), biases zero
    d_head      width of a head when it is not d_model / n_heads
    rope        whether queries and keys rotate by their positions
    """

    packed_prefix = True

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        rope_base: float = 10000.0,
        bias: bool = False,
        init_scale: float = 0.1,
        d_head: int | None = None,
        rope: bool = True,
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
        self.rope = rope
        if rope and self.d_head % 2:
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
        prefix: Tensor | None = None,
    ) -> tuple[Tensor, KVState]:
        if isinstance(mask, Tensor):
            return call_aligned(self.forward, x, state, mask, seq_idx, prefix=prefix)
        q, k, v = self.input_projection(x).unflatten(-1, (self.n_heads, 3 * self.d_head)).chunk(3, dim=-1)  # (b l h p)
        more = dict(mask=mask, seq_idx=seq_idx, prefix=prefix)
        y, state = attend(q, k, v, state, rope_dim=self.d_head if self.rope else 0, rope_base=self.rope_base, **more)
        return self.output_projection(y), state

    def program(self, p: Builder, x: Register) -> Register:
        h, d = self.n_heads, self.d_head
        qkv = p.linear(self.input_projection, x)  # h times [q, k, v]
        q, k, v = (qkv.part(i * d, qkv.size - 2 * d) for i in range(3))
        rope = (d, self.rope_base) if self.rope else (0, 1.0)
        return p.linear(self.output_projection, p.attend(q, k, v, (h, h, d), (3 * d,) * 3, rope))

    def state_bytes(self, length: int) -> int:
        return kv_bytes(self, length, self.n_heads * self.d_head)


class MHA(nn.Module):
    """Causal mixer (b l d) -> (b l d); its state grows with the sequence.

    embed_dim, num_heads, num_heads_kv, head_dim   d, h, j (default h; must divide h), p (default d / h)
    mlp_dim              width of the gated MLP beside the attention, up and gate together, rounded up to 256; 0: none
    d_conv               taps of the convolution over q, k and v; 0: none
    rotary_emb_dim       channels of each head that rotate; 0: no positions
    softmax_scale        default 1 / sqrt(p)
    """

    packed_prefix = True

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
        self.rope = dict(rope_dim=rotary_emb_dim, rope_base=rotary_emb_base, scale=softmax_scale)
        self.heads = [num_heads, self.num_heads_kv, self.num_heads_kv]
        self.qkv_dim = self.head_dim * sum(self.heads)
        out_dim = self.head_dim * num_heads
        self.in_proj = nn.Linear(embed_dim, self.qkv_dim + self.mlp_dim, bias=qkv_proj_bias)
        if d_conv:
            self.conv1d = nn.Conv1d(self.qkv_dim, self.qkv_dim, d_conv, groups=self.qkv_dim)
        self.out_proj = nn.Linear(out_dim + self.mlp_dim // 2, embed_dim, bias=out_proj_bias)

    def forward(
        self,
        x: Tensor,
        state: KVState | None = None,
        *,
        mask: Tensor | Padding | None = None,
        seq_idx: Tensor | None = None,
        prefix: Tensor | None = None,
    ) -> tuple[Tensor, KVState]:
        if isinstance(mask, Tensor):
            return call_aligned(self.forward, x, state, mask, seq_idx, prefix=prefix)
        qkv, mlp = self.in_proj(x).split([self.qkv_dim, self.mlp_dim], dim=-1)
        conv = None
        if self.d_conv:
            past = None if state is None else state.conv
            qkv, conv = short_conv(self.conv1d, qkv.transpose(1, 2), past, self.d_conv, mask, seq_idx, activation=None)
            qkv = qkv.transpose(1, 2)
        q, k, v = qkv.unflatten(-1, (-1, self.head_dim)).split(self.heads, dim=2)  # (b l h p), (b l j p)
        y, state = attend(q, k, v, state, mask=mask, seq_idx=seq_idx, prefix=prefix, **self.rope)
        if self.mlp_dim:
            up, gate = mlp.chunk(2, dim=-1)
            y = torch.cat([y, up * F.silu(gate)], dim=-1)
        return self.out_proj(y), state._replace(conv=conv)

    def program(self, p: Builder, x: Register) -> Register:
        d, (h, j, _) = self.head_dim, self.heads
        qkv, mlp = p.linear(self.in_proj, x).split(self.qkv_dim, self.mlp_dim)
        states = p.kv_states(j, d)  # the convolution's stands behind them
        if self.d_conv:
            qkv = p.conv(self.conv1d, qkv, "none")
        q, k, v = qkv.split(h * d, j * d, j * d)
        y = p.reg(self.out_proj.in_features)
        more = dict(scale=self.rope["scale"], out=y.part(0, h * d), states=states)
        p.attend(q, k, v, (h, j, d), (d,) * 3, (self.rope["rope_dim"], self.rope["rope_base"]), **more)
        if self.mlp_dim:
            up, gate = mlp.split(self.mlp_dim // 2, self.mlp_dim // 2)
            p.mix(gate, up, act="silu", out=y.part(h * d, self.mlp_dim // 2))
        return p.linear(self.out_proj, y)

    def state_bytes(self, length: int) -> int:
        convolution = self.qkv_dim * self.d_conv * itemsize(self)[0]
        return kv_bytes(self, length, self.num_heads_kv * self.head_dim) + convolution


def kv_bytes(module: nn.Module, keys: int, width: int) -> int:
    """Bytes of so many keys and values of `width` channels, with their positions."""
    return keys * (2 * width * itemsize(module)[0] + 8)


def rotated(q: Tensor, k: Tensor, position: Tensor, rope_dim: int, rope_base: float) -> tuple[Tensor, Tensor]:
    """q (b l h p) and k (b l j p) turned by their positions (b l) in the first rope_dim channels."""
    cos, sin = (t[:, :, None] for t in rope_table(position, rope_dim, rope_base, q.dtype))  # (b l 1 rope_dim/2)
    return rotate(q, cos, sin), rotate(k, cos, sin)


def with_old(k: Tensor, v: Tensor, state: KVState | None) -> tuple[Tensor, Tensor]:
    """The keys and values (b s j p) that a state carries, in front of the new ones."""
    if state is None:
        return k, v
    return torch.cat([state.k.to(k.dtype), k], dim=1), torch.cat([state.v.to(v.dtype), v], dim=1)


def positions(b: int, l: int, device, state: KVState | None, seq_idx: Tensor | None) -> tuple[Tensor, Tensor]:
    """(b l): position of every token in its document, and the document's number in the chunk (0 continues state)."""
    done = None if state is None else state.position.amax(1) + 1
    return document_positions(b, l, device, done, seq_idx)


def visible(
    position: Tensor, document: Tensor, state: KVState | None, padding: Padding | None, prefix: Tensor | None
) -> Tensor:
    """Which keys (old, then new) every new token may see: (b 1 l s) bool. A token always sees itself, so that padding
    has something to attend to."""
    l = position.shape[1]
    if l == 1 and state is not None and padding is None:  # one token more of the open document
        return F.pad(state.position >= 0, (0, 1), value=True)[:, None, None]
    allowed = (document[:, :, None] == document[:, None, :]).tril()
    if prefix is not None:
        inside = inside_prefix(prefix, l)  # (b l)
        same = document[:, :, None] == document[:, None, :]
        allowed = allowed | same & inside[:, :, None] & inside[:, None, :]
    if padding is not None:
        itself = torch.eye(l, dtype=torch.bool, device=position.device)
        allowed = allowed & padding.mask[:, None, :] | itself
    if state is not None:
        old = (document[:, :, None] == 0) & (state.position >= 0)[:, None, :]
        allowed = torch.cat([old, allowed], dim=2)
    return allowed[:, None]


def remembered(position: Tensor, document: Tensor, state: KVState | None, padding: Padding | None) -> Tensor:
    """Positions to keep in the state: those of the last document's real tokens; -1 elsewhere. (b s)"""
    if position.shape[1] == 1 and state is not None and padding is None:
        return torch.cat([state.position, position], dim=1)
    last = document[:, -1:]
    keep = document == last if padding is None else (document == last) & padding.mask
    position = torch.where(keep, position, -1)
    if state is None:
        return position
    return torch.cat([torch.where(last == 0, state.position, -1), position], dim=1)
