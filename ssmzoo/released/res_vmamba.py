"""Res-VMamba as released by the public project ResVMamba (no licence, written anew): VSSM and VSSBlock."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ssmzoo.layers.image.ss2d import SS2D
from ssmzoo.models.res_vmamba import ResVMamba
from ssmzoo.models.vmamba import VSSBlock
from ssmzoo.released.arguments import RECOMPUTE, Arguments
from ssmzoo.released.catalogue import Hub, Picture, Weights
from ssmzoo.released.image import RUNNER, act_name, official_norm, official_stages, one_of, with_bias
from ssmzoo.released.vmamba import DOWNSAMPLE, SCAN_INITIAL, from_official, is_block, to_official, to_ours
from ssmzoo.released.vmamba import infer as infer_vmamba

__all__ = ["CATALOGUE", "MODELS", "TELLING_KEYS", "from_official", "infer", "official", "to_official"]
MODELS = (ResVMamba,)
TELLING_KEYS = r"(^|\.)fuse\.\d"


SCAN = {"d_state": 16, "dt_rank": "auto", "ssm_ratio": 2.0, "attn_drop_rate": 0.0}
UNUSED = {"use_checkpoint": RECOMPUTE, "shared_ssm": (False, "is read and has no effect there")}
BROKEN = {"softmax_version": (False, "raises in the released forward pass; there is nothing to reproduce")}
VSSM = Arguments(
    "VSSM",
    {"patch_size": 4, "in_chans": 3, "num_classes": 1000, "depths": (2, 2, 9, 2), "dims": (96, 192, 384, 768)}
    | SCAN
    | {"drop_rate": 0.0, "drop_path_rate": 0.1, "mlp_ratio": 4.0, "patch_norm": True, "norm_layer": "ln"}
    | {"downsample_version": "v2"},
    UNUSED | RUNNER,
    BROKEN,
)
BLOCK = Arguments(
    "VSSBlock",
    {"hidden_dim": 0, "drop_path": 0.0, "norm_layer": "ln"}
    | SCAN
    | {"mlp_ratio": 4.0, "act_layer": "gelu", "drop": 0.0, "norm_eps": 1e-6}  # norm_eps: of norm_layer there
    | {"d_conv": 3, "conv_bias": True, "bias": False},
    UNUSED | SCAN_INITIAL,
    BROKEN,
)
TABLES = (VSSM, BLOCK)


def official(state: dict[str, Tensor], **given):
    """VSSM or VSSBlock of the released project. Without `fuse` keys, as in its checkpoints, no residual path."""
    state = to_ours(state)
    if is_block(state):
        return official_block(**BLOCK.complete(given)), state
    fuse = "learned" if any(key.startswith("fuse.") for key in state) else "none"
    return official_stages(lambda config: ResVMamba(**arguments(config), fuse=fuse), state, VSSM.complete(given))


def arguments(config: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `ResVMamba` for the released VSSM's."""
    return dict(
        patch_size=config["patch_size"],
        in_chans=config["in_chans"],
        num_classes=config["num_classes"],
        depths=config["depths"],
        dims=config["dims"],
        d_state=config["d_state"],
        ssm_ratio=config["ssm_ratio"],
        mixer={"dt_rank": config["dt_rank"], "dropout": config["attn_drop_rate"]},
        mlp_ratio=config["mlp_ratio"],
        stem="patch" if config["patch_norm"] else "patch_no_norm",
        drop_rate=config["drop_rate"],
        downsample=one_of(config, "downsample_version", DOWNSAMPLE),
        drop_path_rate=config["drop_path_rate"],
    )


def official_block(hidden_dim, drop_path, norm_layer, mlp_ratio, act_layer, drop, norm_eps, **scan) -> VSSBlock:
    mixer = SS2D(
        hidden_dim,
        scan["d_state"],
        scan["ssm_ratio"],
        scan["dt_rank"],
        scan["d_conv"],
        scan["conv_bias"],
        dropout=scan["attn_drop_rate"],
    )
    if scan["bias"]:
        mixer.in_proj, mixer.out_proj = with_bias(mixer.in_proj), with_bias(mixer.out_proj)
    mlp = {"act": act_name(act_layer), "drop": drop}
    block = VSSBlock(hidden_dim, mixer, mlp_ratio, official_norm(norm_layer), drop_path, mlp)
    for norm in (block.norm, getattr(block, "norm2", None)):
        if norm is not None:
            norm.eps = norm_eps
    return block


def infer(state: dict[str, Tensor], given: Mapping[str, Any]) -> dict[str, Any]:
    """All that shapes tell, which is all that has weights."""
    names = {"ssm_d_state": "d_state", "ssm_dt_rank": "dt_rank", "ssm_conv": "d_conv", "ssm_conv_bias": "conv_bias"}
    inferred = {names.get(key, key): value for key, value in infer_vmamba(state, given).items()}
    table = BLOCK if is_block(to_ours(state)) else VSSM
    return {key: value for key, value in inferred.items() if key in table.names}


CATALOGUE = (
    Weights(
        "res_vmamba_small",
        Hub("ms57rd/Res-VMamba", "ckpt_epoch_166.pth", "ac94ddd83f143b157ab6b66d5236af415d603d2c"),
        **{"licence": "mit", "bytes": 711_402_283, "picture": Picture()},
        arguments={"ssm_ratio": 2.0, "mlp_ratio": 0.0, "downsample_version": "v1"},
        model={"num_classes": 241},
        metric="CNFOOD-241 (the authors' split) top-1 79.54",
    ),
)
