"""Mamba in the naming of Hugging Face transformers (Apache-2.0): MambaForCausalLM."""

from __future__ import annotations

from torch import Tensor

from ssmzoo.models.mamba import MambaLM
from ssmzoo.released.language import AttentionMask, golden_lm, official_hf_lm, to_hf

to_official = to_hf


def official(
    state: dict,
    vocab_size: int = 50280,
    hidden_size: int = 768,
    state_size: int = 16,
    num_hidden_layers: int = 32,
    layer_norm_epsilon: float = 1e-5,
    expand: float = 2,
    conv_kernel: int = 4,
    use_bias: bool = False,
    use_conv_bias: bool = True,
    hidden_act: str = "silu",
    residual_in_fp32: bool = True,
    time_step_rank: int | str = "auto",
    intermediate_size: int | None = None,
    tie_word_embeddings: bool = True,
    time_step_scale: float = 1.0,
    time_step_min: float = 0.001,
    time_step_max: float = 0.1,
    time_step_init_scheme: str = "random",
    time_step_floor: float = 1e-4,
    initializer_range: float = 0.1,
    rescale_prenorm_residual: bool = False,
    use_cache: bool = True,
    use_mambapy: bool = False,
    use_associative_scan: bool = True,
    pad_token_id: int | None = 0,
    bos_token_id: int | None = 0,
    eos_token_id: int | list | None = 0,
):
    """transformers' MambaForCausalLM; the arguments are MambaConfig's. Those of the last three lines have no part in
    what a trained checkpoint computes."""
    if intermediate_size is not None:
        expand = intermediate_size / hidden_size
    mixer = {
        "d_state": state_size,
        "d_conv": conv_kernel,
        "expand": expand,
        "dt_rank": time_step_rank,
        "bias": use_bias,
        "conv_bias": use_conv_bias,
        "dt_scale": time_step_scale,
        "dt_min": time_step_min,
        "dt_max": time_step_max,
        "dt_init": time_step_init_scheme,
        "dt_init_floor": time_step_floor,
    }
    return official_hf_lm(
        MambaHF,
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


class MambaHF(AttentionMask, MambaLM):
    """Mamba with the inputs of transformers' MambaForCausalLM."""


def golden(case) -> dict[str, Tensor]:
    return golden_lm(case)
