"""Adventurer as released: the classifier, and one block."""

from __future__ import annotations

from torch import Tensor, nn

from ssmzoo.models.adventurer import Adventurer, AdventurerBlock
from ssmzoo.released.image import resize_plain_positions, set_eps

MODELS = (Adventurer,)
TELLING_KEYS = r"norm_mlp\.|mlp\.w3\."
from_official = resize_plain_positions


def official(state: dict[str, Tensor], **official_kwargs):
    """Adventurer, or one block of it, by the keys present."""
    if "mixer.A_log" in state:
        return official_block(**official_kwargs), state
    return official_model(**official_kwargs), state


def official_model(
    img_size=224,
    patch_size: int = 16,
    depth: int = 12,
    embed_dim: int = 192,
    channels: int = 3,
    num_classes: int = 1000,
    ssm_cfg: dict | None = None,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.1,
    norm_epsilon: float = 1e-5,
    rms_norm: bool = True,
    initializer_cfg=None,
    mamba_expand: float = 2,
    mamba_d_state: int = 64,
) -> Adventurer:
    """The released class with its flips (blocks 2 and 3)."""
    model = Adventurer(
        channels,
        num_classes,
        img_size=img_size,
        patch_size=patch_size,
        embed_dim=embed_dim,
        depth=depth,
        d_state=mamba_d_state,
        expand=mamba_expand,
        mixer=mixer_arguments(ssm_cfg),
        flip_rule="released",
        drop_rate=drop_rate,
        drop_path_rate=drop_path_rate,
    )
    return with_norms(model, rms_norm, norm_epsilon)


def official_block(
    d_model: int,
    ssm_cfg: dict | None = None,
    norm_epsilon: float = 1e-5,
    drop_path: float = 0.0,
    rms_norm: bool = True,
    layer_idx: int = 0,
    mamba_expand: float = 2,
    mamba_d_state: int = 64,
    flip: bool = True,
    **mixer,
) -> AdventurerBlock:
    """One block, called with flip=True as in the published cases unless said otherwise."""
    return with_norms(
        AdventurerBlock(
            d_model, mamba_d_state, mamba_expand, drop_path=drop_path, flip=flip, mixer=mixer_arguments(ssm_cfg) | mixer
        ),
        rms_norm,
        norm_epsilon,
    )


def mixer_arguments(ssm_cfg: dict | None) -> dict:
    """The released block fixes ngroups to 1 and leaves the rest to Mamba-2, whose heads have 64 channels by default."""
    given = dict(ssm_cfg or {})
    return {key: value for key, value in given.items() if key not in ("layer", "use_mem_eff_path", "layer_idx")}


def with_norms(module: nn.Module, rms_norm: bool, eps: float) -> nn.Module:
    if not rms_norm:
        raise ValueError("rms_norm=False: every released Adventurer has RMSNorm")
    return set_eps(module, eps)
