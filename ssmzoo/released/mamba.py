"""Mamba as released by state-spaces/mamba (Apache-2.0): MambaLMHeadModel, and the Mamba block alone."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ssmzoo.layers.mixers.mamba import Mamba
from ssmzoo.models.mamba import MambaLM
from ssmzoo.released.language import StepByStep, golden_lm, official_lm

TELLING_KEYS = r"^backbone\.layers\.\d+\.mixer\.x_proj\.weight"


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
    d_state: int = 16,
    d_conv: int = 4,
    expand: float = 2,
    dt_rank: int | str = "auto",
    dt_min: float = 0.001,
    dt_max: float = 0.1,
    dt_init: str = "random",
    dt_scale: float = 1.0,
    dt_init_floor: float = 1e-4,
    conv_bias: bool = True,
    bias: bool = False,
    use_fast_path: bool = True,
    layer_idx: int | None = None,
):
    """mamba_ssm's MambaLMHeadModel (first two lines: MambaConfig), or, for a checkpoint without a backbone, its Mamba
    block. fused_add_norm, use_fast_path and layer_idx choose kernels and caches; the results are the same."""
    if "A_log" in state:
        block = OfficialMamba(
            d_model,
            d_state,
            d_conv,
            expand,
            dt_rank,
            conv_bias,
            bias,
            dt_min=dt_min,
            dt_max=dt_max,
            dt_init=dt_init,
            dt_scale=dt_scale,
            dt_init_floor=dt_init_floor,
        )
        return block, state
    return official_lm(
        MambaLM,
        "Mamba1",
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


class OfficialMamba(StepByStep, Mamba):
    """The mixer with the inputs and outputs of mamba_ssm's."""


def golden(case) -> dict[str, Tensor]:
    return golden_lm(case) if "n_layer" in case.official_kwargs else case.run_official()
