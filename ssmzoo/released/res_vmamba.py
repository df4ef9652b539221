"""Res-VMamba as released by the public project ResVMamba (no licence, written anew): VSSM and VSSBlock."""

from __future__ import annotations

from torch import Tensor

from ssmzoo.layers.image.ss2d import SS2D
from ssmzoo.models.res_vmamba import ResVMamba
from ssmzoo.models.vmamba import VSSBlock
from ssmzoo.released.image import act_name, official_norm, official_stages
from ssmzoo.released.vmamba import from_official, official_mixer, to_official, to_ours

__all__ = ["MODELS", "TELLING_KEYS", "from_official", "official", "to_official"]
MODELS = (ResVMamba,)
TELLING_KEYS = r"(^|\.)fuse\.\d"


def official(state: dict[str, Tensor], **official_kwargs):
    """VSSM or VSSBlock of the released project. Without `fuse` keys, as in its checkpoints, no residual path."""
    state = to_ours(state)
    if "op.x_proj_weight" in state:
        return official_block(**official_kwargs), state
    fuse = "learned" if any(key.startswith("fuse.") for key in state) else "none"
    return official_stages(
        ResVMamba, lambda **kwargs: official_arguments(**kwargs) | {"fuse": fuse}, state, official_kwargs
    )


def official_arguments(
    patch_size: int = 4,
    in_chans: int = 3,
    num_classes: int = 1000,
    depths=(2, 2, 9, 2),
    dims=(96, 192, 384, 768),
    d_state: int = 16,
    dt_rank="auto",
    ssm_ratio: float = 2.0,
    attn_drop_rate: float = 0.0,
    shared_ssm: bool = False,
    softmax_version: bool = False,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.1,
    mlp_ratio: float = 0.0,
    patch_norm: bool = True,
    norm_layer="ln",
    downsample_version: str = "v1",
    use_checkpoint: bool = False,
) -> dict:
    """Arguments of `ResVMamba` for the released VSSM's."""
    if softmax_version:
        raise ValueError("softmax_version=True raises in the released forward pass; there is nothing to reproduce")
    return dict(
        patch_size=patch_size,
        in_chans=in_chans,
        num_classes=num_classes,
        depths=depths,
        dims=dims,
        d_state=d_state,
        ssm_ratio=ssm_ratio,
        mixer={"dt_rank": dt_rank, "dropout": attn_drop_rate},
        mlp_ratio=mlp_ratio,
        stem="patch" if patch_norm else "patch_no_norm",
        drop_rate=drop_rate,
        downsample={"v1": "merge", "v2": "conv2"}[downsample_version],
        drop_path_rate=drop_path_rate,
    )


def official_block(
    hidden_dim: int,
    drop_path: float = 0.0,
    norm_layer="ln",
    attn_drop_rate: float = 0.0,
    d_state: int = 16,
    dt_rank="auto",
    ssm_ratio: float = 2.0,
    shared_ssm: bool = False,
    softmax_version: bool = False,
    use_checkpoint: bool = False,
    mlp_ratio: float = 4.0,
    act_layer="gelu",
    drop: float = 0.0,
    norm_eps: float = 1e-5,
) -> VSSBlock:
    """norm_eps is that of the released whole models."""
    options = official_mixer("v0", d_state, ssm_ratio, dt_rank, dropout=attn_drop_rate)
    block = VSSBlock(
        hidden_dim,
        SS2D(hidden_dim, **options),
        mlp_ratio,
        official_norm(norm_layer),
        drop_path,
        {"act": act_name(act_layer), "drop": drop},
    )
    for norm in (block.norm, getattr(block, "norm2", None)):
        if norm is not None:
            norm.eps = norm_eps
    return block
