"""Adventurer as released: the classifier, and one block. Our names are theirs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ssmzoo.models.adventurer import Adventurer, AdventurerBlock
from ssmzoo.released.arguments import DEVICE, KERNEL, Arguments
from ssmzoo.released.catalogue import Hub, Picture, Weights
from ssmzoo.released.image import RUNNER, infer_plain, layer_norms, resize_plain_positions
from ssmzoo.released.infer import part, ratio
from ssmzoo.released.mamba2 import BLOCK as MAMBA2

MODELS = (Adventurer,)
TELLING_KEYS = r"norm_mlp\.|mlp\.w3\."
SHARED = {"ssm_cfg": None, "norm_epsilon": 1e-5, "rms_norm": False, "mamba_expand": 2, "mamba_d_state": 64}
WITHOUT = {
    "fused_add_norm": (False, KERNEL),
    "residual_in_fp32": (False, "the residual stream is kept in fp32 here"),
    **DEVICE,
}
MODEL = Arguments(
    "Adventurer",
    {
        **{"img_size": 224, "patch_size": 16, "depth": 12, "embed_dim": 256, "channels": 3, "num_classes": 1000},
        **{"drop_rate": 0.0, "drop_path_rate": 0.1, **SHARED},
    },
    WITHOUT | RUNNER | {"initializer_cfg": (None, "sets initial values")},
)
BLOCK = Arguments(
    "create_block",
    SHARED | {"drop_path": 0.0, "flip": True},  # flip: an argument of the block's forward there
    WITHOUT | {"layer_idx": (None, "names the block in a cache")},
    required=("d_model",),
)
TABLES = (MODEL, BLOCK)
from_official = resize_plain_positions


def official(state: dict[str, Tensor], **given):
    """Adventurer with its released flips (blocks 2 and 3), or one block of it, by the keys present."""
    block = "mixer.A_log" in state
    config = (BLOCK if block else MODEL).complete(given)
    d = config["d_model" if block else "embed_dim"]
    mixer = mixer_arguments(d, config)
    if block:
        model = AdventurerBlock(
            d, expand=config["mamba_expand"], drop_path=config["drop_path"], flip=config["flip"], **mixer
        )
    else:
        model = Adventurer(
            config["channels"],
            config["num_classes"],
            img_size=config["img_size"],
            patch_size=config["patch_size"],
            embed_dim=d,
            depth=config["depth"],
            expand=config["mamba_expand"],
            flip_rule="released",
            drop_rate=config["drop_rate"],
            drop_path_rate=config["drop_path_rate"],
            **mixer,
        )
    model = layer_norms(model, config["rms_norm"], config["norm_epsilon"])
    return model, state if block else from_official(model, state)


def mixer_arguments(d: int, config: dict[str, Any]) -> dict[str, Any]:
    """d_state and mixer of our block; the released one fixes ngroups to 1 and leaves the rest to Mamba-2's defaults."""
    given = {"d_state": config["mamba_d_state"]} | {k: v for k, v in (config["ssm_cfg"] or {}).items() if k != "layer"}
    ours = MAMBA2.complete({"d_model": d, "expand": config["mamba_expand"]} | given)
    unread = ("d_model", "expand", "d_state", "clamp_steps")
    return {"d_state": ours["d_state"], "mixer": {key: value for key, value in ours.items() if key not in unread}}


def infer(state: dict[str, Tensor], given: Mapping[str, Any]) -> dict[str, Any]:
    """All that has weights; which blocks flip the sequence has none."""
    if "mixer.A_log" in state:
        d = len(state["norm.weight"])
        return {"d_model": d, "rms_norm": "norm.bias" not in state} | infer_mixer(part(state, "mixer."), d, given)
    inferred = infer_plain(state, given, 1, None)
    return inferred and inferred | infer_mixer(part(state, "layers.0.mixer."), inferred["embed_dim"], given)


def infer_mixer(state: dict[str, Tensor], d: int, given: Mapping[str, Any]) -> dict[str, Any]:
    h, e = len(state["A_log"]), state["out_proj.weight"].shape[1]
    inferred = {"mamba_expand": ratio(e, d), "ssm_cfg": {"headdim": e // h, "d_conv": state["conv1d.weight"].shape[-1]}}
    if "d_state" not in (given.get("ssm_cfg") or {}):
        inferred["mamba_d_state"] = (len(state["conv1d.weight"]) - e) // 2
    return inferred


WRAPPERS = ("model", "state_dict", "model_ema")  # what the authors evaluate
CATALOGUE = tuple(
    Weights(
        f"adventurer_{preset}",
        Hub(f"Wangf3014/{repo}", file),
        arguments={"rms_norm": True, "mamba_d_state": 64, "mamba_expand": 2, "img_size": size},
        picture=Picture(size, crop),
        metric=f"ImageNet-1k top-1 {top1}",
    )
    for preset, repo, file, size, crop, top1 in (
        ("tiny", "Adventurer", "adventurer_tiny_patch16_224.pth", 224, 0.875, 78.2),
        ("small", "Adventurer", "adventurer_small_patch16_224.pth", 224, 0.875, 81.8),
        ("base", "Adventurer", "adventurer_base_patch16_224.pth", 224, 0.875, 82.6),
        ("large", "Adventurer", "adventurer_large_patch16_224.pth", 224, 0.875, 83.4),
        ("base_patch8", "Adventurer", "adventurer_base_patch8_224.pth", 224, 1.0, 83.9),
        ("base_384", "Adventurer", "adventurer_base_patch16_384.pth", 384, 1.0, 84.2),
        ("base_448", "Adventurer", "adventurer_base_patch16_448.pth", 448, 1.0, 84.3),
        ("base_patch8_448", "Adventurer", "adventurer_base_patch8_448.pth", 448, 1.0, 84.8),
        ("base_patch1_128", "Patch_Scaling", "adventurer_base_patch1_128.pth", 128, 1.0, 82.4),
        ("small_patch1_128", "Patch_Scaling", "adventurer_small_patch1_128.pth", 128, 1.0, 81.4),
        ("tiny_patch1_128", "Patch_Scaling", "adventurer_tiny_patch1_128.pth", 128, 1.0, 80.7),
        ("base_patch1_64", "Patch_Scaling", "adventurer_base_patch1_64.pth", 64, 0.875, 80.9),
        ("small_patch1_64", "Patch_Scaling", "adventurer_small_patch1_64.pth", 64, 0.875, 80.5),
        ("tiny_patch1_64", "Patch_Scaling", "adventurer_tiny_patch1_64.pth", 64, 0.875, 77.4),
        ("tiny_patch1", "Patch_Scaling", "adventurer_tiny_patch1_224.pth", 224, 1.0, 81.9),
        ("small_patch1", "Patch_Scaling", "adventurer_small_patch1_224.pth", 224, 1.0, 83.8),
        ("base_patch1", "Patch_Scaling", "adventurer_base_patch1_224.pth", 224, 1.0, 84.6),
    )
)
