"""Mamba-3 as released by state-spaces/mamba (Apache-2.0): MambaLMHeadModel over Mamba3 layers, and the block alone."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ssmzoo.layers.mixers.mamba3 import Mamba3
from ssmzoo.models.mamba3 import Mamba3LM
from ssmzoo.released.language import StepByStep, golden_lm, official_lm


def official(
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
    d_state: int = 128,
    expand: float = 2,
    headdim: int = 64,
    ngroups: int = 1,
    rope_fraction: float = 0.5,
    dt_min: float = 0.001,
    dt_max: float = 0.1,
    dt_init_floor: float = 1e-4,
    A_floor: float = 1e-4,
    is_outproj_norm: bool = False,
    is_mimo: bool = False,
    mimo_rank: int = 4,
    chunk_size: int = 64,
    layer_idx: int | None = None,
):
    """mamba_ssm's MambaLMHeadModel over Mamba3 layers (first four lines: MambaConfig), or, for a checkpoint without a
    backbone, its Mamba3 block. fused_add_norm and layer_idx choose kernels and caches only."""
    if "dt_bias" not in state:
        return official_lm(
            Mamba3LM,
            "Mamba3",
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
    block = OfficialMamba3(
        d_model,
        d_state,
        expand,
        headdim,
        ngroups,
        rope_fraction,
        is_outproj_norm,
        is_mimo,
        mimo_rank,
        A_floor,
        chunk_size,
        dt_min=dt_min,
        dt_max=dt_max,
        dt_init_floor=dt_init_floor,
    )
    return block, state


class OfficialMamba3(StepByStep, Mamba3):
    """The mixer with the inputs and outputs of mamba_ssm's."""


def golden(case) -> dict[str, Tensor]:
    return golden_lm(case) if "n_layer" in case.official_kwargs else case.run_official()
