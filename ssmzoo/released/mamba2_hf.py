"""Mamba-2 in the naming of Hugging Face transformers (Apache-2.0): Mamba2ForCausalLM."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from ssmzoo.models.mamba2 import Mamba2LM
from ssmzoo.released.language import AttentionMask, golden_lm, official_hf_lm, to_hf
from ssmzoo.released.mamba2 import unclamped

to_official = to_hf


def official(
    state: dict,
    num_heads: int = 128,
    head_dim: int = 64,
    vocab_size: int = 32768,
    hidden_size: int = 4096,
    state_size: int = 128,
    num_hidden_layers: int = 64,
    layer_norm_epsilon: float = 1e-5,
    expand: float = 2,
    conv_kernel: int = 4,
    n_groups: int = 8,
    use_bias: bool = False,
    use_conv_bias: bool = True,
    hidden_act: str = "silu",
    residual_in_fp32: bool = True,
    time_step_limit: Sequence[float] = (0.0, math.inf),
    chunk_size: int = 256,
    tie_word_embeddings: bool = False,
    time_step_min: float = 0.001,
    time_step_max: float = 0.1,
    time_step_floor: float = 1e-4,
    time_step_rank: int | str = "auto",
    clamp_steps: bool = True,
    initializer_range: float = 0.1,
    rescale_prenorm_residual: bool = False,
    use_cache: bool = True,
    pad_token_id: int | None = 1,
    bos_token_id: int | None = 0,
    eos_token_id: int | list | None = 2,
):
    """transformers' Mamba2ForCausalLM; the arguments are Mamba2Config's, plus clamp_steps: False repeats the official
    single-token steps, which forget time_step_limit. What stands after it has no part in what a trained checkpoint
    computes, nor have chunk_size, time_step_min, time_step_max, time_step_floor and time_step_rank."""
    if hidden_size * expand != num_heads * head_dim:
        raise ValueError(
            f"hidden_size * expand must equal num_heads * head_dim, got {hidden_size} * {expand} and "
            f"{num_heads} * {head_dim}"
        )
    mixer = {
        "d_state": state_size,
        "d_conv": conv_kernel,
        "expand": expand,
        "headdim": head_dim,
        "ngroups": n_groups,
        "norm_eps": layer_norm_epsilon,
        "bias": use_bias,
        "conv_bias": use_conv_bias,
        "chunk_size": chunk_size,
        "dt_limit": time_step_limit,
        "dt_min": time_step_min,
        "dt_max": time_step_max,
        "dt_init_floor": time_step_floor,
        "clamp_steps": clamp_steps,
    }
    return official_hf_lm(
        Mamba2HF,
        state,
        vocab_size,
        hidden_size,
        num_hidden_layers,
        mixer,
        layer_norm_epsilon,
        hidden_act,
        residual_in_fp32,
        tie_word_embeddings,
    )


class Mamba2HF(AttentionMask, Mamba2LM):
    """Mamba-2 with the inputs of transformers' Mamba2ForCausalLM."""


def golden(case) -> dict[str, Tensor]:
    case.meta["official_kwargs"] = unclamped(case)
    return golden_lm(case)
