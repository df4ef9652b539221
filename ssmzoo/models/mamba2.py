"""Mamba-2: the Mamba language model around the state-space-duality mixer, alone or with attention layers between.

    x <- x + Mamba2(RMSNorm(x)) for every layer;   logits = W_head RMSNorm(x), W_head tied to the embedding

The mixer and its equations are in layers/mixers/mamba2.py; the container, its initialisation and the attention hybrid
are those of ssmzoo/models/mamba.py. Paper and code agree; the released single-token steps differ from the released
whole-sequence form where a time-step limit is set (they do not clamp), and ours follow the whole-sequence form.
Source: Dao & Gu 2024 (arXiv 2405.21060); state-spaces/mamba modules/{mamba2,mamba2_simple,mha}.py and Hugging Face
transformers models/mamba2 (Apache-2.0) for names, initialisation and checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from ssmzoo.layers.mixers.mamba2 import Mamba2
from ssmzoo.models.mamba import AttentionMask, MambaLM, StepByStep, golden_lm, official_hf_lm, official_lm


class Mamba2LM(MambaLM):
    """ids (b l) -> ModelOutput(logits (b l v), state, {}). Arguments of MambaLM; `ssm_cfg` are the arguments of
    ssmzoo.layers.mixers.mamba2.Mamba2, whose defaults are the published models' (d_state 128, headdim 64)."""

    mixer = Mamba2


class OfficialMamba2(StepByStep, Mamba2):
    """The mixer with the inputs and outputs of mamba_ssm's."""


class Mamba2HF(AttentionMask, Mamba2LM):
    """Mamba-2 with the inputs of transformers' Mamba2ForCausalLM."""


def official_mamba2(
    state: dict,
    d_model: int = 2560,
    n_layer: int = 64,
    d_intermediate: int = 0,
    vocab_size: int = 50277,
    ssm_cfg: dict | None = None,
    attn_layer_idx: Sequence[int] | None = None,
    attn_cfg: dict | None = None,
    rms_norm: bool = True,
    residual_in_fp32: bool = True,
    fused_add_norm: bool = True,
    pad_vocab_size_multiple: int = 8,
    tie_embeddings: bool = True,
    d_state: int | None = None,
    d_conv: int = 4,
    conv_init: float | None = None,
    expand: float = 2,
    headdim: int | None = None,
    d_ssm: int | None = None,
    ngroups: int = 1,
    A_init_range: Sequence[float] = (1, 16),
    D_has_hdim: bool = False,
    rmsnorm: bool = True,
    norm_before_gate: bool = False,
    dt_min: float = 0.001,
    dt_max: float = 0.1,
    dt_init_floor: float = 1e-4,
    dt_limit: Sequence[float] = (0.0, math.inf),
    bias: bool = False,
    conv_bias: bool = True,
    chunk_size: int = 256,
    learnable_init_states: bool | None = None,
    activation: str = "swish",
    clamp_steps: bool = True,
    use_mem_eff_path: bool = True,
    layer_idx: int | None = None,
):
    """mamba_ssm's MambaLMHeadModel over Mamba2 layers (first four lines: MambaConfig), or, for a checkpoint without a
    backbone, its Mamba2 block; with `learnable_init_states` True or False its Mamba2Simple, whose d_state, headdim and
    norm groups default differently. clamp_steps=False repeats the official single-token steps, which forget dt_limit.
    fused_add_norm, use_mem_eff_path and layer_idx choose kernels and caches only."""
    if "A_log" not in state:
        return official_lm(
            Mamba2LM,
            "Mamba2",
            state,
            d_model,
            n_layer,
            d_intermediate,
            vocab_size,
            ssm_cfg,
            attn_layer_idx,
            attn_cfg,
            rms_norm,
            residual_in_fp32,
            pad_vocab_size_multiple,
            tie_embeddings,
        )
    if activation not in ("swish", "silu"):
        raise ValueError(f"activation must be 'swish' or its other name 'silu', got {activation!r}")
    simple = learnable_init_states is not None
    block = OfficialMamba2(
        d_model,
        d_state or (64 if simple else 128),
        d_conv,
        expand,
        headdim or (128 if simple else 64),
        ngroups,
        d_ssm,
        rmsnorm,
        norm_before_gate,
        norm_groups=1 if simple else None,
        D_has_hdim=D_has_hdim,
        bias=bias,
        conv_bias=conv_bias,
        dt_limit=dt_limit,
        dt_min=dt_min,
        dt_max=dt_max,
        dt_init_floor=dt_init_floor,
        A_init_range=A_init_range,
        conv_init=conv_init,
        chunk_size=chunk_size,
        learnable_init_states=bool(learnable_init_states),
        clamp_steps=clamp_steps,
    )
    return block, state


def official_mamba2_hf(
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


def golden_mamba2(case) -> dict[str, Tensor]:
    case.meta["official_kwargs"] = unclamped(case)
    return golden_lm(case) if "n_layer" in case.official_kwargs else case.run_official()


def golden_mamba2_hf(case) -> dict[str, Tensor]:
    case.meta["official_kwargs"] = unclamped(case)
    return golden_lm(case)


def unclamped(case) -> dict:
    """The case's constructor arguments with the official steps, by which its continuations were decoded."""
    kwargs = case.official_kwargs
    if "ssm_cfg" in kwargs:
        return kwargs | {"ssm_cfg": dict(kwargs["ssm_cfg"]) | {"clamp_steps": False}}
    return kwargs | {"clamp_steps": False}
