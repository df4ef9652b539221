"""MambaIRv2 as released by MambaIR@33d7b34 (Apache-2.0): MambaIRv2 and MambaIRv2Light."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ssmzoo.layers.image.window_attention import relative_position_index
from ssmzoo.models.mambair_v2 import MambaIRv2
from ssmzoo.released.arguments import Arguments
from ssmzoo.released.catalogue import Asset, Weights
from ssmzoo.released.files import CheckpointError
from ssmzoo.released.infer import part, ratio
from ssmzoo.released.mambair import WITHOUT as MAMBAIR
from ssmzoo.released.mambair import WRAPPERS, infer_restoration

__all__ = [
    "CATALOGUE",
    "MODELS",
    "TABLES",
    "TELLING_KEYS",
    "WRAPPERS",
    "from_official",
    "infer",
    "official",
    "to_official",
]

MODELS = (MambaIRv2,)
TELLING_KEYS = r"embeddingA|\.assm\.|\.win_mhsa\."


SIZES = {
    **{"in_chans": 3, "embed_dim": 48, "d_state": 8, "depths": (6, 6, 6, 6), "num_heads": (4, 4, 4, 4)},
    **{"window_size": 16, "inner_rank": 32, "num_tokens": 64, "mlp_ratio": 2.0, "qkv_bias": True},
    **{"patch_norm": True, "upscale": 2, "img_range": 1.0, "upsampler": "", "resi_connection": "1conv"},
    **{"img_size": 64, "patch_size": 1, "ape": False},
    **{"routing": "argmax"},  # ours: 'argmax' gives the same twice, 'gumbel' draws noise as the release does
}
WITHOUT = {key: MAMBAIR[key] for key in ("use_checkpoint", "norm_layer", "type")}
MODEL = Arguments("MambaIRv2", SIZES | {"convffn_kernel_size": 5}, WITHOUT)
LIGHT = Arguments("MambaIRv2Light", SIZES, WITHOUT | {"convffn_kernel_size": (5, "the light class does not read it")})
TABLES = (MODEL, LIGHT)


def official(state: dict[str, Tensor], **given):
    """MambaIRv2 or MambaIRv2Light by the released names; which one is read off the checkpoint's keys."""
    light = any(".convffn1.sg." in key for key in state)
    config = (LIGHT if light else MODEL).complete(given)
    size, patch, ape = (config.pop(key) for key in ("img_size", "patch_size", "ape"))
    if config["upsampler"] not in ("pixelshuffle", "pixelshuffledirect", "nearest+conv"):
        config |= {"upsampler": "", "upscale": 1}
    swin = {key: config.pop(key) for key in ("qkv_bias", "patch_norm")} | {"ape": int(ape)}
    model = MambaIRv2(**config, light=light, swin=swin)
    if ape:
        rows, columns = (size, size) if isinstance(size, int) else size
        table = torch.zeros(1, (rows // patch) * (columns // patch), config["embed_dim"])
        model.absolute_pos_embed = nn.Parameter(table)
    return model, from_official(model, state)


def infer(state: dict[str, Tensor], given: Mapping[str, Any]) -> dict[str, Any]:
    """All that has weights: heads and window by the table of relative positions; img_range has none."""
    inferred = infer_restoration(state, "layers.0.")
    if not inferred:
        return {}
    first = "layers.0.residual_group.layers.0."
    assm, hidden = part(state, f"{first}assm."), len(state[f"{first}convffn1.fc1.weight"])
    inferred |= {"d_state": assm["selectiveScan.A_logs"].shape[1], "inner_rank": assm["embeddingB.weight"].shape[1]}
    inferred |= {"num_tokens": len(assm["embeddingB.weight"]), "mlp_ratio": ratio(hidden, inferred["embed_dim"])}
    tables = [
        state[f"layers.{i}.residual_group.layers.0.win_mhsa.relative_position_bias_table"]
        for i in range(len(inferred["depths"]))
    ]
    inferred |= {"window_size": (round(len(tables[0]) ** 0.5) + 1) // 2, "num_heads": [t.shape[1] for t in tables]}
    inferred |= {"qkv_bias": f"{first}wqkv.bias" in state, "ape": "absolute_pos_embed" in state}
    kernel = state.get(f"{first}convffn1.dwconv.depthwise_conv.0.weight")
    return inferred | ({} if kernel is None else {"convffn_kernel_size": kernel.shape[-1]})


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


RELEASE = "https://github.com/csguoh/MambaIR/releases/download/v1.0/"
PUBLISHED = {  # PSNR (dB) / SSIM
    **{"light_x2": "Urban100 33.26 / 0.9378", "light_x3": "Urban100 29.01 / 0.8689"},
    **{"light_x4": "Urban100 26.82 / 0.8079", "base_x2": "Urban100 34.49 / 0.9468"},
    **{"base_x3": "Urban100 30.28 / 0.8905", "base_x4": "Urban100 27.89 / 0.8344"},
    **{"denoise.sigma15": "Urban100 35.42", "jpeg.q10": "Classic5 30.37 / 0.8269"},
    **{"jpeg.q30": "Classic5 33.81 / 0.8970", "jpeg.q40": "Classic5 34.64 / 0.9093"},
}
DIGESTS = {
    "small_x4": "374d91798ffd901b76504068b5bcb47ea58cba9b8f889ac627428c3c34f3545d",
    "large_x4": "9f9090cda07ed4b8498c2db9863c8c263cd300f445017ec77b7fc8babbb8a78d",
}
ASSETS = {f"light_x{s}": f"mambairv2_lightSR_x{s}.pth" for s in (2, 3, 4)}
ASSETS |= {
    f"{k}_x{s}": f"mambairv2_classicSR_{k.title()}_x{s}.pth" for k in ("small", "base", "large") for s in (2, 3, 4)
}
ASSETS |= {"denoise.sigma15": "mambairv2_ColorDN_15.pth"} | {
    f"jpeg.q{q}": f"mambairv2_jpeg_q{q}.pth" for q in (10, 30, 40)
}
CATALOGUE = tuple(
    Weights(
        f"mambair_v2_{name.partition('.')[0]}",
        Asset(RELEASE + file),
        name.partition(".")[2],
        **{"licence": "apache-2.0", "sha256": DIGESTS.get(name)},
        metric=f"PSNR (/ SSIM) {PUBLISHED[name]}" if name in PUBLISHED else "",
    )
    for name, file in ASSETS.items()
)
