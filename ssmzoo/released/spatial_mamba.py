"""Spatial-Mamba as released: classifier, pyramid, block, mixer, fusion of states. Our names are theirs."""

from __future__ import annotations

from torch import Tensor, nn

from ssmzoo.models.spatial_mamba import SpatialMamba, SpatialMambaBlock, StateFusion, StructureAwareSSM
from ssmzoo.released.image import official_stages
from ssmzoo.released.names import cut_prefix

MODELS = (SpatialMamba,)
TELLING_KEYS = r"state_fusion\.|patch_embed\.conv1\."


def official(state: dict[str, Tensor], **official_kwargs):
    """SpatialMamba, Backbone_SpatialMamba, SpatialMambaBlock, StructureAwareSSM or StateFusion, by the keys present."""
    if "kernel_3" in state:
        return StateFusion(**official_kwargs), state
    if "x_proj_weight" in state:
        return official_mixer(**official_kwargs), state
    if "self_attention.x_proj_weight" in state:
        return official_block(**official_kwargs), state
    return official_stages(SpatialMamba, official_arguments, state, official_kwargs)


def official_arguments(
    img_size: int = 224,
    patch_size: int = 4,
    in_chans: int = 3,
    num_classes: int = 1000,
    depths=(2, 2, 9, 2),
    dims=(96, 192, 384, 768),
    d_state: int | None = 1,
    dt_init: str = "random",
    mlp_ratio: float = 4.0,
    drop_rate: float = 0.0,
    attn_drop_rate: float = 0.0,
    drop_path_rate: float = 0.1,
    norm_layer="ln",
    patch_norm: bool = True,
    use_checkpoint: bool = False,
) -> dict:
    """Arguments of `SpatialMamba` for the released class's (img_size, dt_init and patch_norm change nothing there)."""
    if patch_size != 4:
        raise ValueError(f"patch_size={patch_size}: the stem of Spatial-Mamba has stride 4")
    dims = [dims] if isinstance(dims, int) else list(dims)
    if any(later != 2 * earlier for earlier, later in zip(dims, dims[1:])):
        raise ValueError(f"dims={dims}: the downsampling doubles the width, so every entry must be twice the last")
    check_state_size(d_state)
    return dict(
        in_chans=in_chans,
        num_classes=num_classes,
        depths=depths,
        embed_dim=dims[0],
        mlp_ratio=mlp_ratio,
        mixer={"dropout": attn_drop_rate},
        drop_rate=drop_rate,
        drop_path_rate=drop_path_rate,
    )


def official_block(
    hidden_dim: int,
    drop_path: float = 0.0,
    norm_layer="ln",
    attn_drop_rate: float = 0.0,
    d_state: int = 1,
    dt_init: str = "random",
    mlp_ratio: float = 4.0,
    norm_eps: float = 1e-5,
    **mixer,
):
    """Further arguments go to the mixer, as released. norm_eps is that of the whole models."""
    check_state_size(d_state)
    block = SpatialMambaBlock(hidden_dim, mlp_ratio, drop_path, norm_eps)
    block.self_attention = official_mixer(hidden_dim, dropout=attn_drop_rate, **mixer)
    return block


def official_mixer(
    d_model: int,
    d_state: int = 1,
    d_conv: int = 3,
    expand: float = 2,
    dt_rank="auto",
    dropout: float = 0.0,
    conv_bias: bool = True,
    bias: bool = False,
    dt_min: float = 1e-3,
    dt_max: float = 0.1,
    dt_init: str = "random",
    dt_scale: float = 1.0,
    dt_init_floor: float = 1e-4,
):
    """dt_* only set the initial values, which a checkpoint replaces."""
    check_state_size(d_state)
    return StructureAwareSSM(d_model, expand, dt_rank, d_conv, conv_bias, bias, dropout)


def check_state_size(d_state: int | None) -> None:
    if d_state != 1:
        raise ValueError(f"d_state={d_state}: Spatial-Mamba fuses one state per channel; only d_state=1 exists")


def to_official(module: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return cut_prefix("backbone.", state)
