"""ShuffleMamba as released: VisionMamba of models_shuffle, and of models_reg with registers."""

from __future__ import annotations

from torch import Tensor

from ssmzoo.models.shuffle_mamba import ShuffleMamba, ShuffleMambaReg
from ssmzoo.released.image import set_eps
from ssmzoo.released.vim import from_official, official_mixer_arguments

__all__ = ["MODELS", "TELLING_KEYS", "from_official", "official"]
MODELS = (ShuffleMamba, ShuffleMambaReg)
TELLING_KEYS = r"pos_embed_cls|norm_neck"


def official(state: dict[str, Tensor], **official_kwargs):
    """VisionMamba of models_shuffle, or of models_reg if the checkpoint has register positions."""
    eps = official_kwargs.get("norm_epsilon", 1e-5)
    if "pos_embed_cls" not in state:
        for key in ("num_cls_tokens", "cls_reduce"):  # the released constructor swallows them
            official_kwargs.pop(key, None)
        return set_eps(ShuffleMamba(**official_arguments(**official_kwargs)), eps), state
    registers = {
        ours: official_kwargs.pop(theirs, 1)
        for ours, theirs in (("n_registers", "num_cls_tokens"), ("cls_reduce", "cls_reduce"))
    }
    arguments = official_arguments(**official_kwargs)
    if arguments.pop("norm") != "rms":
        raise ValueError("rms_norm=False: the released register model exists with RMSNorm only")
    return set_eps(ShuffleMambaReg(**arguments, **registers), eps), state


def official_arguments(
    img_size=224,
    patch_size: int = 16,
    stride: int = 16,
    depth: int = 24,
    embed_dim: int = 192,
    channels: int = 3,
    num_classes: int = 1000,
    ssm_cfg: dict | None = None,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.1,
    shuffle_rate: float = 0.1,
    norm_epsilon: float = 1e-5,
    rms_norm: bool = True,
    initializer_cfg=None,
    fused_add_norm: bool = True,
    residual_in_fp32: bool = True,
) -> dict:
    """Arguments of `ShuffleMamba` for the released VisionMamba's; its mixer is always bidirectional and halved."""
    if stride not in (patch_size, 16):
        raise ValueError(f"stride={stride}: the released ShuffleMamba has patches that touch ({patch_size})")
    mixer = official_mixer_arguments("v2", True, **(ssm_cfg or {}))
    return dict(
        in_chans=channels,
        num_classes=num_classes,
        img_size=img_size,
        patch_size=patch_size,
        embed_dim=embed_dim,
        depth=depth,
        d_state=mixer.pop("d_state", 16),
        mixer=mixer,
        norm="rms" if rms_norm else "ln",
        shuffle_rate=shuffle_rate,
        drop_rate=drop_rate,
        drop_path_rate=drop_path_rate,
    )
