"""The Transformers that MoE-Mamba's paper compares with, and llm-random's checkpoints of all of them.

    x += Attention(LN(x));  x += FF(LN(x))      FF dense (ReLU, 4 d_model, no bias) or a Switch mixture of experts

Rotary positions inside the attention, none at the input; no final norm, untied head; truncated normal with scale 0.1.
Source: arXiv 2401.04081; llm-random (Apache-2.0), lizrd/core/llm.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssmzoo.layers.decoder import Block, check_sizes
from ssmzoo.layers.feedforward.mlp import FeedForward
from ssmzoo.layers.mixers.attention import Attention
from ssmzoo.models.moe_mamba import DecoderLM, moe_factory


class TransformerLM(DecoderLM):
    """The Transformer baseline; the defaults are the paper's 25M row.

    n_heads           must divide d_model into heads of even width
    d_ff              width of the dense feed-forward, 4 d_model by default; the experts' width when there are experts
    n_experts         0: dense; otherwise a Switch layer in every block (the paper's Transformer-MoE has 32)
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

        def block() -> Block:
            feedforward = moe(d_model, d_model) if moe else FeedForward(d_model, d_ff, expert)
            return Block(d_model, {"attention": Attention(d_model, n_heads, rope_base), "feedforward": feedforward})

        super().__init__(vocab_size, d_model, [block() for _ in range(n_blocks)])
