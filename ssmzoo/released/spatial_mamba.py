"""Spatial-Mamba as released: classifier, pyramid, block, mixer, fusion of states. Our names are theirs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ssmzoo.layers.image.mlp import make_mlp
from ssmzoo.models.spatial_mamba import SpatialMamba, SpatialMambaBlock, StateFusion, StructureAwareSSM
from ssmzoo.released.arguments import DEVICE, INITIAL, RECOMPUTE, Arguments
from ssmzoo.released.catalogue import Picture, Weights, on_drive
from ssmzoo.released.image import LOADED, RUNNER, act_name, is_pyramid, official_stages
from ssmzoo.released.infer import count, part, ratio
from ssmzoo.released.names import cut_prefix
from ssmzoo.released.vmamba import SCAN_INITIAL

MODELS = (SpatialMamba,)
TELLING_KEYS = r"state_fusion\.|patch_embed\.conv1\."


WHOLE = {
    **{"img_size": 224, "patch_size": 4, "in_chans": 3, "num_classes": 1000, "depths": (2, 2, 9, 2)},
    **{"dims": (96, 192, 384, 768), "mlp_ratio": 4.0, "drop_rate": 0.0, "attn_drop_rate": 0.0, "drop_path_rate": 0.1},
}
ONE_STATE = {"d_state": (1, "Spatial-Mamba fuses one state per channel; only d_state=1 exists")}
EITHER = ("ln", "a LayerNorm under either name")
WITHOUT = {
    **{"dt_init": ("random", INITIAL), "norm_layer": EITHER, "patch_norm": (True, "unread there")},
    "use_checkpoint": RECOMPUTE,
}
MODEL = Arguments("SpatialMamba", WHOLE, WITHOUT | RUNNER, ONE_STATE)
PYRAMID = Arguments("Backbone_SpatialMamba", WHOLE | {"out_indices": (0, 1, 2, 3)}, WITHOUT | LOADED, ONE_STATE)
SCAN = {"d_conv": 3, "expand": 2, "dt_rank": "auto", "conv_bias": True, "bias": False}
BLOCK = Arguments(
    "SpatialMambaBlock",
    {"hidden_dim": 0, "drop_path": 0.0, "attn_drop_rate": 0.0, "mlp_ratio": 4.0, "mlp_act_layer": "gelu"}
    | {"mlp_drop_rate": 0.0, "norm_eps": 1e-6}  # norm_eps: of norm_layer there
    | SCAN,
    SCAN_INITIAL | {"norm_layer": EITHER, "use_checkpoint": RECOMPUTE, "num_heads": (8, "unread there")},
    ONE_STATE,
)
MIXER = Arguments("StructureAwareSSM", {"dropout": 0.0} | SCAN, SCAN_INITIAL | DEVICE, ONE_STATE, required=("d_model",))
FUSION = Arguments("StateFusion", {}, required=("dim",))
TABLES = (MODEL, PYRAMID, BLOCK, MIXER, FUSION)


def official(state: dict[str, Tensor], **given):
    """SpatialMamba, Backbone_SpatialMamba, SpatialMambaBlock, StructureAwareSSM or StateFusion, by the keys present."""
    if "kernel_3" in state:
        return StateFusion(**FUSION.complete(given)), state
    if "x_proj_weight" in state:
        return mixer(**MIXER.complete(given)), state
    if "self_attention.x_proj_weight" in state:
        return official_block(**BLOCK.complete(given)), state
    return official_stages(build, state, (PYRAMID if is_pyramid(state, given) else MODEL).complete(given))


def build(config: dict[str, Any]) -> SpatialMamba:
    if config["patch_size"] != 4:
        raise ValueError(f"patch_size={config['patch_size']}: the stem of Spatial-Mamba has stride 4")
    dims = [config["dims"]] if isinstance(config["dims"], int) else list(config["dims"])
    if any(later != 2 * earlier for earlier, later in zip(dims, dims[1:])):
        raise ValueError(f"dims={dims}: the downsampling doubles the width, so every entry must be twice the last")
    return SpatialMamba(
        in_chans=config["in_chans"],
        num_classes=config["num_classes"],
        depths=config["depths"],
        embed_dim=dims[0],
        mlp_ratio=config["mlp_ratio"],
        mixer={"dropout": config["attn_drop_rate"]},
        drop_rate=config["drop_rate"],
        drop_path_rate=config["drop_path_rate"],
    )


def mixer(d_model, d_conv, expand, dt_rank, dropout, conv_bias, bias) -> StructureAwareSSM:
    return StructureAwareSSM(d_model, expand, dt_rank, d_conv, conv_bias, bias, dropout)


def official_block(hidden_dim, drop_path, attn_drop_rate, mlp_ratio, mlp_act_layer, mlp_drop_rate, norm_eps, **scan):
    block = SpatialMambaBlock(hidden_dim, mlp_ratio, drop_path, norm_eps)
    block.mlp = make_mlp(hidden_dim, int(mlp_ratio * hidden_dim), act=act_name(mlp_act_layer), drop=mlp_drop_rate)
    block.self_attention = mixer(hidden_dim, dropout=attn_drop_rate, **scan)
    return block


def infer(state: dict[str, Tensor], given: Mapping[str, Any]) -> dict[str, Any]:
    """All that has weights."""
    if "kernel_3" in state:
        return {"dim": len(state["kernel_3"])}
    if "x_proj_weight" in state:
        return {"d_model": len(state["out_proj.weight"])} | infer_mixer(state)
    if "self_attention.x_proj_weight" in state:
        return {"hidden_dim": len(state["ln_1.weight"])} | infer_block(state)
    depths = [count(state, f"layers.{i}.blocks.#.") for i in range(count(state, "layers.#."))]
    if not depths:
        return {}
    dims = [len(state[f"layers.{i}.blocks.0.ln_1.weight"]) for i in range(len(depths))]
    inferred = {
        "depths": depths,
        "dims": dims,
        "mlp_ratio": infer_block(part(state, "layers.0.blocks.0."))["mlp_ratio"],
    }
    stem = next(value for key, value in state.items() if key.startswith("patch_embed.") and value.ndim == 4)
    inferred["in_chans"] = stem.shape[1]
    return inferred | ({"num_classes": len(state["head.weight"])} if "head.weight" in state else {})


def infer_block(state: dict[str, Tensor]) -> dict[str, Any]:
    hidden, d = state["mlp.fc1.weight"].shape[:2]
    return {"mlp_ratio": ratio(hidden, d)} | infer_mixer(part(state, "self_attention."))


def infer_mixer(state: dict[str, Tensor]) -> dict[str, Any]:
    d, e = state["out_proj.weight"].shape[:2]
    return {
        **{"expand": ratio(e, d), "d_conv": state["conv2d.weight"].shape[-1], "conv_bias": "conv2d.bias" in state},
        **{"bias": "in_proj.bias" in state, "dt_rank": state["dt_projs_weight"].shape[-1]},
    }


def to_official(module: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return cut_prefix("backbone.", state)


CATALOGUE = tuple(
    Weights(
        f"spatial_mamba_{size}",
        on_drive(key),
        licence="apache-2.0",
        arguments={"d_state": 1, "dt_init": "random"},
        picture=Picture(),
        metric=f"ImageNet-1k top-1 {top1}",
    )
    for size, key, top1 in (
        ("tiny", "19kXoqGSTuKKs4AHbdUSrdKZTwTWenLIW", 83.5),
        ("small", "1Wb3sYoWLpgmWrmHMYKwdgDwGPZaqM28O", 84.6),
        ("base", "1k8dHp2QRCOqBSgAi36YkhZp_O8LqOPjM", 85.3),
    )
)
