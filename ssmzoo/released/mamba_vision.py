"""MambaVision as released by NVlabs/MambaVision: the classifier, or its mixer alone.

The hub's model.safetensors and config.json are those of its transformers class, which puts `model.` before every name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ssmzoo.layers.image.mamba_vision import MambaVisionMixer
from ssmzoo.models.mamba_vision import MambaVision
from ssmzoo.released.arguments import DEVICE, KERNEL, Arguments
from ssmzoo.released.catalogue import Hub, Picture, Weights
from ssmzoo.released.image import RUNNER
from ssmzoo.released.infer import count, part, ratio
from ssmzoo.released.names import Names, cut_prefix
from ssmzoo.released.vmamba import SCAN_INITIAL

MODELS = (MambaVision,)
MODEL_TYPE = "mambavision"
TELLING_KEYS = (r"levels\.\d+\.blocks\.\d+\.mixer\.conv1d_z\.weight", r"patch_embed\.conv_down\.0\.weight")
NAMES = Names(
    ("patch_embed.conv_down.0.{p}", "patch_embed.conv1.{p}"),
    ("patch_embed.conv_down.1.{p}", "patch_embed.norm1.{p}"),
    ("patch_embed.conv_down.3.{p}", "patch_embed.conv2.{p}"),
    ("patch_embed.conv_down.4.{p}", "patch_embed.norm2.{p}"),
    ("levels.{i}.downsample.reduction.0.{p}", "layers.{i}.downsample.conv.{p}"),
    ("levels.{rest}", "layers.{rest}"),
)
PREPARED = "how pictures are prepared; the catalogue says it to `ssmzoo predict`"
MODEL = Arguments(
    "MambaVision",
    {
        **{"in_chans": 3, "num_classes": 1000, "drop_path_rate": 0.2, "drop_rate": 0.0, "qkv_bias": True},
        **{"qk_scale": None, "layer_scale": None, "layer_scale_conv": None},
    },
    {
        **{
            "resolution": (224, "read by nothing there"),
            "crop_mode": ("center", PREPARED),
            "crop_pct": (0.875, PREPARED),
        },
        **{"mean": (None, PREPARED), "std": (None, PREPARED), "input_size": (None, PREPARED)},
        **{"interpolation": ("bicubic", PREPARED), **RUNNER},
    },
    {"attn_drop_rate": (0.0, "the released attention would draw at random in evaluation as well")},
    required=("dim", "in_dim", "depths", "window_size", "mlp_ratio", "num_heads"),
)
MIXER = Arguments(
    "MambaVisionMixer",
    {"d_state": 16, "d_conv": 4, "expand": 2, "dt_rank": "auto", "bias": False},
    {
        **{"conv_bias": (True, "halved to a whole number there: the convolutions never have one")},
        **{"use_fast_path": (True, KERNEL), "layer_idx": (None, "the number of the block")},
        **SCAN_INITIAL,
        **DEVICE,
    },
    required=("d_model",),
)
TABLES = (MODEL, MIXER)


def official(state: dict[str, Tensor], **given):
    """MambaVision, or MambaVisionMixer alone."""
    if "conv1d_z.weight" in state:
        return MambaVisionMixer(**MIXER.complete(given)), state
    config = MODEL.complete(given)
    model = MambaVision(
        in_chans=config["in_chans"],
        num_classes=config["num_classes"],
        depths=config["depths"],
        embed_dim=config["dim"],
        stem_dim=config["in_dim"],
        num_heads=config["num_heads"],
        window_size=config["window_size"],
        mlp_ratio=config["mlp_ratio"],
        attention={"qkv_bias": config["qkv_bias"], "qk_norm": bool(config["qk_scale"])},
        layer_scale=number(config["layer_scale"]),
        conv_layer_scale=number(config["layer_scale_conv"]),
        proj_drop_rate=config["drop_rate"],
        drop_path_rate=config["drop_path_rate"],
    )
    return model, from_official(model, state)


def number(layer_scale: Any) -> float | None:
    """What the released blocks take as one: anything but a number is no scale."""
    return float(layer_scale) if type(layer_scale) in (int, float) else None


def from_official(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return NAMES.to_ours(cut_prefix("model.", state))


def to_official(module: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return state if isinstance(module, MambaVisionMixer) else NAMES.to_theirs(state)


def infer(state: dict[str, Tensor], given: Mapping[str, Any]) -> dict[str, Any]:
    """All but the windows and, without norms of queries and keys, the heads, which have no weights."""
    state = cut_prefix("model.", state)
    if "conv1d_z.weight" in state:
        d, e = state["out_proj.weight"].shape
        half, n = state["A_log"].shape
        told = {"d_model": d, "d_state": n, "d_conv": state["conv1d_z.weight"].shape[-1], "expand": ratio(2 * half, d)}
        return told | {"dt_rank": state["dt_proj.weight"].shape[1], "bias": "in_proj.bias" in state}
    if "patch_embed.conv_down.0.weight" not in state:
        return {}
    stages = [part(state, f"levels.{i}.") for i in range(count(state, "levels.#."))]
    windows = [stage for stage in stages if "blocks.0.mlp.fc1.weight" in stage]
    told: dict[str, Any] = {"depths": [count(stage, "blocks.#.") for stage in stages]}
    in_dim, channels = state["patch_embed.conv_down.0.weight"].shape[:2]
    told |= {"dim": len(state["patch_embed.conv_down.3.weight"]), "in_dim": in_dim, "in_chans": channels}
    if "head.weight" in state:
        told["num_classes"] = len(state["head.weight"])
    hidden, d = windows[0]["blocks.0.mlp.fc1.weight"].shape
    told["mlp_ratio"] = ratio(hidden, d)
    for name, scale, key in (
        ("layer_scale", 1e-5, "levels.2.blocks.0.gamma_1"),
        ("layer_scale_conv", 1e-5, "levels.0.blocks.0.gamma"),
    ):
        if given.get(name) is None and key in state:  # the value is in the file
            told[name] = scale
    attention = next((key for key in windows[0] if key.endswith("mixer.qkv.weight")), None)
    if attention is not None:
        told["qkv_bias"] = attention.replace("weight", "bias") in windows[0]
        if normed := windows[0].get(attention.replace("qkv", "q_norm")) is not None:
            told["qk_scale"] = normed
    return told


def _entry(preset: str, repo: str, top1: float, top5: float, size: int, crop: float, tag: str = "", note: str = ""):
    heads = [2, 4, 8, 16] if preset in ("tiny", "tiny2", "small", "base") else [4, 8, 16, 32]
    windows = {224: [8, 8, 14, 7], 256: [8, 8, 16, 8], 512: [8, 8, 32, 16]}[size]
    return Weights(
        f"mamba_vision_{preset}",
        Hub(f"nvidia/MambaVision-{repo}", "model.safetensors"),
        tag=tag,
        licence="CC-BY-NC-SA-4.0",
        arguments={"num_heads": heads, "window_size": windows},
        picture=Picture(size, crop),
        metric=f"ImageNet-1k top-1 {top1}, top-5 {top5}",
        note=note,
    )


SQUASH = "measured on pictures that were resized without keeping their aspect ratio"
CATALOGUE = (
    _entry("tiny", "T-1K", 82.3, 96.2, 224, 1.0),
    _entry("tiny2", "T2-1K", 82.7, 96.3, 224, 0.98),
    _entry("small", "S-1K", 83.3, 96.5, 224, 0.93),
    _entry("base", "B-1K", 84.2, 96.9, 224, 1.0),
    _entry("large", "L-1K", 85.0, 97.1, 224, 1.0),
    _entry("large2", "L2-1K", 85.3, 97.2, 224, 1.0),
    _entry("base", "B-21K", 84.9, 97.5, 224, 1.0, tag="in21k"),
    _entry("large", "L-21K", 86.1, 97.9, 224, 1.0, tag="in21k"),
    _entry("large2_512", "L2-512-21K", 87.3, 98.4, 512, 0.93, note=SQUASH),
    _entry("large3", "L3-256-21K", 87.3, 98.3, 256, 1.0),
    _entry("large3_512", "L3-512-21K", 88.1, 98.6, 512, 0.93, note=SQUASH),
)
