"""Mamba-2 as released by state-spaces/mamba (Apache-2.0): MambaLMHeadModel, Mamba2 and Mamba2Simple."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from ssmzoo.layers.mixers.mamba2 import Mamba2
from ssmzoo.models.mamba2 import Mamba2LM
from ssmzoo.released.language import StepByStep, golden_lm, official_lm

TELLING_KEYS = r"^backbone\.layers\.\d+\.mixer\.dt_bias"


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
        norm_before_gate=norm_before_gate,
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


class OfficialMamba2(StepByStep, Mamba2):
    """The mixer with the inputs and outputs of mamba_ssm's."""


def golden(case) -> dict[str, Tensor]:
    case.meta["official_kwargs"] = unclamped(case)
    return golden_lm(case) if "n_layer" in case.official_kwargs else case.run_official()


def unclamped(case) -> dict:
    """The case's constructor arguments with the official steps, by which its continuations were decoded."""
    kwargs = case.official_kwargs
    if "ssm_cfg" in kwargs:
        return kwargs | {"ssm_cfg": dict(kwargs["ssm_cfg"]) | {"clamp_steps": False}}
    return kwargs | {"clamp_steps": False}
