"""Vim as released by hustvl/Vim (Apache-2.0): VisionMamba, and its bidirectional mixer alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ssmzoo.models.vim import Vim, VimMixer
from ssmzoo.released.image import resize_plain_positions, set_eps

MODELS = (Vim,)
TELLING_KEYS = r"A_b_log"
YIELDS_TO = ("shuffle_mamba",)


DIRECTIONS = {"v2": "both", "v1": "shared", "none": "forward"}


INITIAL = ("dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor", "use_fast_path", "layer_idx")


def official(state: dict[str, Tensor], **official_kwargs):
    """VisionMamba, or its mixer alone, by the keys present."""
    if "in_proj.weight" in state:
        return VimMixer(**official_mixer_arguments(**official_kwargs)), state
    model = Vim(**official_arguments(**official_kwargs))
    return set_eps(model, official_kwargs.get("norm_epsilon", 1e-5)), from_official(model, state)


def from_official(model: Vim, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A released (or our own) state dict under our names, positions resized to this model's grid."""
    state = {key: value for key, value in state.items() if not key.startswith("rope.")}
    if "cls_token_head" in state:
        state["cls_token"] = torch.cat([state.pop("cls_token_head"), state.pop("cls_token_tail")], dim=1)
    return resize_plain_positions(model, state)


def official_arguments(
    img_size=224,
    patch_size: int = 16,
    stride: int = 16,
    depth: int = 24,
    embed_dim: int = 192,
    d_state: int = 16,
    channels: int = 3,
    num_classes: int = 1000,
    ssm_cfg: dict | None = None,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.1,
    norm_epsilon: float = 1e-5,
    rms_norm: bool = True,
    initializer_cfg=None,
    fused_add_norm: bool = True,
    residual_in_fp32: bool = True,
    ft_seq_len: int | None = None,
    pt_hw_seq_len: int = 14,
    if_bidirectional: bool = False,
    final_pool_type: str = "none",
    if_abs_pos_embed: bool = True,
    if_rope: bool = False,
    if_rope_residual: bool = False,
    flip_img_sequences_ratio: float = -1.0,
    if_bimamba: bool = False,
    bimamba_type: str = "v2",
    if_cls_token: bool = True,
    if_divide_out: bool = True,
    init_layer_scale=None,
    use_double_cls_token: bool = False,
    use_middle_cls_token: bool = True,
) -> dict:
    """Arguments of `Vim` for the released VisionMamba's."""
    if flip_img_sequences_ratio > 0:
        raise ValueError(
            f"flip_img_sequences_ratio={flip_img_sequences_ratio}: sequences reversed at random, in "
            f"evaluation too, are not offered"
        )
    pools = {"none": "last", "mean": "avg", "max": "max_logits", "all": "all"}
    token = "double" if use_double_cls_token else "middle" if use_middle_cls_token else "head"
    mixer = official_mixer_arguments(
        "v1" if if_bimamba else bimamba_type, if_divide_out, init_layer_scale, **(ssm_cfg or {})
    )
    return dict(
        in_chans=channels,
        num_classes=num_classes,
        img_size=img_size,
        patch_size=patch_size,
        stride=stride,
        embed_dim=embed_dim,
        depth=depth,
        d_state=mixer.pop("d_state", d_state),
        class_token=token if if_cls_token else "none",
        global_pool="token" if if_cls_token else pools[final_pool_type],
        mixer=mixer,
        norm="rms" if rms_norm else "ln",
        pos_embed=if_abs_pos_embed,
        rope=("stream" if if_rope_residual else "branch") if if_rope else None,
        rope_options={"reference": pt_hw_seq_len, "from_second": True},
        paired=if_bidirectional,
        drop_rate=drop_rate,
        drop_path_rate=drop_path_rate,
    )


def official_mixer_arguments(
    bimamba_type: str = "none", if_divide_out: bool = False, init_layer_scale=None, **mamba
) -> dict:
    """Arguments of `VimMixer` for the released Mamba's; those for initial values or kernels are dropped."""
    if bimamba_type not in DIRECTIONS:
        raise ValueError(f"bimamba_type is {bimamba_type!r}; the released code knows {', '.join(DIRECTIONS)}")
    mamba = {key: value for key, value in mamba.items() if key not in INITIAL}
    return mamba | dict(directions=DIRECTIONS[bimamba_type], halve=if_divide_out, layer_scale=init_layer_scale)


def to_official(module: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The released names, with the rotary tables that its state dicts hold."""
    state = dict(state)
    if getattr(module, "layout", None) == "double":
        state["cls_token_head"], state["cls_token_tail"] = state.pop("cls_token").split(1, dim=1)
    if getattr(module, "rope", None):
        angles = released_angles(module.grid, module.embed_dim, module.rope_options.reference)
        state |= {"rope.freqs_cos": angles.cos(), "rope.freqs_sin": angles.sin()}
    return state


def released_angles(grid: tuple[int, int], d: int, reference: int) -> Tensor:
    """Angles (m d) of the released rotary positions, to the last bit: rows in the first half of d, then columns."""
    frequencies = 1.0 / 10000 ** (torch.arange(0, d // 2, 2).float() / (d // 2))
    rows, columns = (
        (torch.arange(side) / side * reference)[:, None].mul(frequencies).repeat_interleave(2, dim=1) for side in grid
    )
    return torch.cat(torch.broadcast_tensors(rows[:, None], columns[None]), dim=-1).flatten(0, 1)
