"""MambaIRv2 as released by MambaIR@33d7b34 (Apache-2.0): MambaIRv2 and MambaIRv2Light."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmzoo.layers.image.window_attention import relative_position_index
from ssmzoo.models.mambair_v2 import MambaIRv2
from ssmzoo.released.files import CheckpointError

MODELS = (MambaIRv2,)
TELLING_KEYS = r"embeddingA|\.assm\.|\.win_mhsa\."


def official(
    state: dict[str, Tensor],
    *,
    img_size: int = 64,
    patch_size: int = 1,
    ape: bool = False,
    routing: str = "argmax",
    **official_kwargs,
):
    """MambaIRv2 or MambaIRv2Light by the released names; which one is read off the checkpoint's keys.

    img_size, patch_size  only size the position table of `ape`; use_checkpoint is without effect, as in the release
    routing               'argmax' (default here: results repeat) or 'gumbel', the released behaviour
    """
    kwargs = {k: v for k, v in official_kwargs.items() if k not in ("use_checkpoint", "norm_layer", "type")}
    light = any(".convffn1.sg." in key for key in state)
    defaults = {
        "embed_dim": 48,
        "d_state": 8,
        "depths": (6, 6, 6, 6),
        "num_heads": (4, 4, 4, 4),
        "window_size": 16,
        "inner_rank": 32,
        "num_tokens": 64,
        "upscale": 2,
        "upsampler": "",
    }
    kwargs = defaults | kwargs | {"light": light, "routing": routing, "ape": img_size // patch_size if ape else 0}
    if kwargs["upsampler"] not in ("pixelshuffle", "pixelshuffledirect", "nearest+conv"):
        kwargs |= {"upsampler": "", "upscale": 1}
    if light:
        kwargs.pop("convffn_kernel_size", None)  # the released light model accepts and ignores it
    model = MambaIRv2(**kwargs)
    return model, from_official(model, state)


def from_official(model: MambaIRv2, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the index of relative positions: ours is rebuilt, a different one is refused."""
    index = state.get("relative_position_index_SA")
    if index is not None and not torch.equal(index.cpu(), relative_position_index(model.window_size)):
        raise CheckpointError(
            f"relative_position_index_SA of the checkpoint is not that of window_size = {model.window_size}"
        )
    return {key: value for key, value in state.items() if key != "relative_position_index_SA"}


def to_official(module: MambaIRv2, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The released names, with the index of relative positions that its state dicts hold."""
    return {**state, "relative_position_index_SA": relative_position_index(module.window_size)}
