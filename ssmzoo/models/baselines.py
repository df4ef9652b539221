"""Transformer, Transformer-MoE: what MoE-Mamba's paper compares with, and llm-random's checkpoints of all of them.

    x += Attention(LN(x));  x += FF(LN(x))      FF dense (ReLU, 4 d_model, no bias) or a Switch mixture of experts

Rotary positions inside the attention, none at the input; no final norm, untied head; truncated normal with scale 0.1.
With attention "selective" a token takes keys away from those behind it, without a parameter more:

    z = scaled scores of the first head,   S_tk = relu(z_tk) for k < t, 0 for the first key of a document
    F_tk = sum over q < t of S_qk,         softmax over k of (scores - F) in all heads

With attention "threshold" a token reads only the keys whose score is positive, nearer ones first, by its own measure:

    q, k of unit mean square,   S_tk = relu(scaled score) where k <= t,   kept: S_tk > 0
    D_tk = logsigmoid(w x_t + b) (number of kept keys from k to t),       softmax over the kept k of (S + D)

b batch, l length, s keys (old and new), h heads, p width of a head.
Source: arXiv 2401.04081; llm-random (Apache-2.0), lizrd/core/llm.py. Selective attention: Leviathan et al. 2024 (arXiv
2410.02703); its loss for a smaller memory and its pruning of masked keys are not here. Threshold relative attention:
arXiv 2503.23174.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssmzoo.layers.decoder import Block, check_sizes
from ssmzoo.layers.feedforward.mlp import FeedForward
from ssmzoo.layers.mixers.attention import Attention, KVState, positions, remembered, rotated, visible, with_old
from ssmzoo.layers.norm import fp32
from ssmzoo.layers.state import Padding, call_aligned, itemsize
from ssmzoo.models.moe_mamba import DecoderLM, moe_factory
from ssmzoo.ops.transforms import scaled_dot_product_attention
from ssmzoo.suggest import nearest


class SelectiveState(NamedTuple):
    k: Tensor  # (b s h p) rotated by its position already
    v: Tensor  # (b s h p)
    position: Tensor  # (b s) position in its document, -1 for keys that no later token may see
    masked: Tensor  # (b s) fp32, F of the next token


class SelectiveAttention(Attention):
    """Causal mixer (b l d) -> (b l d) whose tokens mask earlier keys for later tokens; reads in one direction only."""

    packed_prefix = False

    def forward(
        self,
        x: Tensor,
        state: SelectiveState | None = None,
        *,
        mask: Tensor | Padding | None = None,
        seq_idx: Tensor | None = None,
    ) -> tuple[Tensor, SelectiveState]:
        if isinstance(mask, Tensor):
            return call_aligned(self.forward, x, state, mask, seq_idx)
        q, k, v = self.input_projection(x).unflatten(-1, (self.n_heads, 3 * self.d_head)).chunk(3, dim=-1)  # (b l h p)
        position, document = positions(*x.shape[:2], x.device, state, seq_idx)
        q, k = rotated(q, k, position, self.d_head, self.rope_base)
        allowed, at = visible(position, document, state, mask, None)[:, 0], position  # (b l s), (b s)
        before = torch.zeros(at.shape, dtype=torch.promote_types(k.dtype, torch.float32), device=k.device)
        k, v = with_old(k, v, state)
        if state is not None:
            at, before = torch.cat([state.position, at], dim=1), torch.cat([state.masked, before], dim=1)
        chosen = selections(q[:, :, 0], k[:, :, 0], allowed, at, mask)
        total = before[:, None] + chosen.cumsum(1)  # (b l s)
        hidden = torch.cat([before[:, None], total[:, :-1]], dim=1)
        bias = torch.where(allowed, -hidden, -torch.inf).to(q.dtype)
        y = scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), attn_mask=bias[:, None])
        state = SelectiveState(k, v, remembered(position, document, state, mask), total[:, -1])
        return self.output_projection(y.transpose(1, 2).flatten(2)), state

    def state_bytes(self, length: int) -> int:
        return super().state_bytes(length) + length * itemsize(self)[1]


def selections(q: Tensor, k: Tensor, allowed: Tensor, position: Tensor, padding: Padding | None) -> Tensor:
    """S (b l s), fp32: how much every token masks the keys before it for those behind it.

    q (b l p) and k (b s p) of the first head, rotated; allowed (b l s) the keys in sight; position (b s) of the keys.
    """
    z = fp32(q @ k.transpose(1, 2)) * q.shape[-1] ** -0.5
    earlier = torch.ones_like(allowed).tril(k.shape[1] - q.shape[1] - 1)
    able = allowed & earlier & (position != 0)[:, None]
    if padding is not None:
        able = able & padding.mask[..., None]
    return F.relu(z).masked_fill(~able, 0)


class ThresholdAttention(Attention):
    """Threshold relative attention, a causal mixer (b l d) -> (b l d) without positions of its own: distance is counted
    in the keys that a token keeps. A token that keeps none reads 0. Reads in one direction only."""

    packed_prefix = False

    def __init__(self, d_model: int, n_heads: int, rope_base: float = 10000.0):
        super().__init__(d_model, n_heads, rope_base, rope=False)
        self.decay = nn.Linear(d_model, n_heads)

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
        q, k, v = self.input_projection(x).unflatten(-1, (self.n_heads, 3 * self.d_head)).chunk(3, dim=-1)  # (b l h p)
        q, k = (F.rms_norm(t, t.shape[-1:], eps=1e-6) for t in (q, k))
        position, document = positions(*x.shape[:2], x.device, state, seq_idx)
        allowed = visible(position, document, state, mask, None)  # (b 1 l s)
        k, v = with_old(k, v, state)
        scores = fp32(q.transpose(1, 2) @ k.permute(0, 2, 3, 1)) * self.d_head**-0.5  # (b h l s)
        A = weights_above_threshold(scores, fp32(self.decay(x)).transpose(1, 2), allowed).to(v.dtype)
        y = (A @ v.transpose(1, 2)).transpose(1, 2).flatten(2)
        return self.output_projection(y), KVState(k, v, remembered(position, document, state, mask))


def weights_above_threshold(scores: Tensor, decay: Tensor, allowed: Tensor) -> Tensor:
    """A (b h l s) of scores (b h l s), decay (b h l) before logsigmoid, allowed (b 1 l s); 0 in rows that keep none."""
    S = F.relu(scores)
    kept = (S > 0) & allowed
    between = kept.flip(-1).cumsum(-1).flip(-1)  # kept keys from this one to the last
    logits = (S + F.logsigmoid(decay)[..., None] * between).masked_fill(~kept, -torch.inf)
    return torch.where(kept.any(-1, keepdim=True), logits, 0).softmax(-1) * kept


MIXERS = {"full": Attention, "selective": SelectiveAttention, "threshold": ThresholdAttention}


class TransformerLM(DecoderLM):
    """The Transformer baseline; the defaults are the paper's 25M row.

    n_heads           must divide d_model into heads of even width
    d_ff              width of the dense feed-forward, 4 d_model by default; the experts' width when there are experts
    n_experts         0: dense; otherwise a Switch layer in every block (the paper's Transformer-MoE has 32)
    attention         full; selective: tokens mask keys for those behind them; threshold: only positive scores, as above
    expert, top_k, capacity_factor, eval_capacity_factor, balance_weight, z_loss_weight,
    router_options    as in MoEMambaLM

    Raises ValueError for bad sizes and unknown names.
    """

    def __init__(
        self,
        vocab_size: int = 50257,
        d_model: int = 512,
        n_blocks: int = 8,
        n_heads: int = 8,
        d_ff: int | None = None,
        n_experts: int = 0,
        expert: str = "relu",
        top_k: int = 1,
        capacity_factor: float | None = 1.0,
        eval_capacity_factor: float | None = None,
        balance_weight: float = 0.01,
        z_loss_weight: float = 0.0,
        rope_base: float = 10000.0,
        router_options: Mapping[str, Any] | None = None,
        attention: str = "full",
    ):
        d_ff = 4 * d_model if d_ff is None else d_ff
        check_sizes(vocab_size=vocab_size, d_model=d_model, n_blocks=n_blocks, n_heads=n_heads, d_ff=d_ff, top_k=top_k)
        if n_experts < 0:
            raise ValueError(f"n_experts must be 0 (dense) or positive, got {n_experts}")
        moe = n_experts and moe_factory(
            n_experts,
            d_ff,
            expert,
            "token_choice",
            top_k,
            capacity_factor,
            eval_capacity_factor,
            balance_weight,
            z_loss_weight,
            router_options,
        )

        if attention not in MIXERS:
            raise ValueError(
                f"attention = {attention!r}; choose from {', '.join(MIXERS)}{nearest(str(attention), MIXERS)}"
            )
        mixer = MIXERS[attention]

        def block() -> Block:
            feedforward = moe(d_model, d_model) if moe else FeedForward(d_model, d_ff, expert)
            return Block(d_model, {"attention": mixer(d_model, n_heads, rope_base), "feedforward": feedforward})

        super().__init__(vocab_size, d_model, [block() for _ in range(n_blocks)])
