"""ShuffleMamba as released: VisionMamba of models_shuffle, and of models_reg with registers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ssmzoo.models.shuffle_mamba import ShuffleMamba, ShuffleMambaReg
from ssmzoo.released.arguments import DEVICE, KERNEL, Arguments
from ssmzoo.released.catalogue import Hub, Picture, Weights
from ssmzoo.released.image import RUNNER, infer_plain, layer_norms
from ssmzoo.released.infer import part
from ssmzoo.released.vim import from_official, infer_mixer, mixer_arguments, slow_path

__all__ = ["CATALOGUE", "MODELS", "TABLES", "TELLING_KEYS", "from_official", "infer", "official"]
MODELS = (ShuffleMamba, ShuffleMambaReg)
TELLING_KEYS = r"pos_embed_cls|norm_neck"
SHARED = {
    **{"img_size": 224, "patch_size": 16, "stride": 16, "depth": 24, "embed_dim": 192, "channels": 3},
    **{"num_classes": 1000, "ssm_cfg": None, "drop_rate": 0.0, "drop_path_rate": 0.1, "shuffle_rate": 0.1},
    **{"norm_epsilon": 1e-5, "rms_norm": False},
}
WITHOUT = {
    **{"initializer_cfg": (None, "sets initial values"), "fused_add_norm": (False, KERNEL)},
    **{"residual_in_fp32": (False, "the residual stream is kept in fp32 here"), **DEVICE, **RUNNER},
}
SWALLOWED = {
    "num_cls_tokens": (1, "the class swallows it without registers"),
    "cls_reduce": (1, "the class swallows it without registers"),
}
MODEL = Arguments("VisionMamba (models_shuffle)", SHARED, WITHOUT | SWALLOWED)
REGISTERS = Arguments("VisionMamba (models_reg)", SHARED | {"num_cls_tokens": 1, "cls_reduce": 1}, WITHOUT)
TABLES = (MODEL, REGISTERS)


def official(state: dict[str, Tensor], **given):
    """VisionMamba of models_shuffle, or of models_reg if the checkpoint has register positions. The released mixer is
    always bidirectional and halved."""
    registers = "pos_embed_cls" in state
    config = (REGISTERS if registers else MODEL).complete(given)
    touch = config["stride"] == config["patch_size"]
    d = config["embed_dim"]
    options = {"d_model": d, "bimamba_type": "v2", "if_divide_out": True} | dict(config["ssm_cfg"] or {})
    mixer, slow = mixer_arguments(options)
    arguments = dict(
        in_chans=config["channels"],
        num_classes=config["num_classes"],
        img_size=config["img_size"],
        patch_size=config["patch_size"],
        embed_dim=d,
        depth=config["depth"],
        d_state=mixer["d_state"],
        mixer={key: value for key, value in mixer.items() if key not in ("d_model", "d_state")},
        shuffle_rate=config["shuffle_rate"],
        drop_rate=config["drop_rate"],
        drop_path_rate=config["drop_path_rate"],
    )
    if registers and not touch:
        raise ValueError(f"stride={config['stride']}: with registers the patches of {config['patch_size']} must touch")
    if registers:
        model = ShuffleMambaReg(**arguments, n_registers=config["num_cls_tokens"], cls_reduce=config["cls_reduce"])
    else:
        model = ShuffleMamba(**arguments, stride=config["stride"])
    return slow_path(layer_norms(model, config["rms_norm"], config["norm_epsilon"]), slow), state


def infer(state: dict[str, Tensor], given: Mapping[str, Any]) -> dict[str, Any]:
    """All that has weights; the shuffle rate has none, and the stride shows in the number of positions only."""
    registers = "pos_embed_cls" in state
    inferred = infer_plain(state, given, 0 if registers else 1, None if registers else MODEL.default("stride"))
    if not inferred:
        return {}
    mixer = infer_mixer(part(state, "layers.0.mixer."))
    inferred["ssm_cfg"] = {key: value for key, value in mixer.items() if key != "bimamba_type"}
    if registers:
        inferred |= {"num_cls_tokens": state["cls_token"].shape[1], "stride": inferred["patch_size"]}
        if "neck.weight" in state:
            inferred["cls_reduce"] = inferred["embed_dim"] // len(state["neck.weight"])
    return inferred


WRAPPERS = ("model", "state_dict", "model_ema")  # what the authors of Mamba-Reg evaluate
CATALOGUE = tuple(  # ShuffleMamba's own weights are not released; Mamba-Reg has the tensors of the one with registers
    Weights(
        f"mamba_reg_{size}",
        Hub("Wangf3014/Mamba-Reg", f"mambar_{size}_patch16_224.pth"),
        arguments={"rms_norm": True, "shuffle_rate": 0.0},
        picture=Picture(crop=1.0),
        metric=f"ImageNet-1k top-1 {top1}",
    )
    for size, top1 in (("small", 81.4), ("base", 83.0), ("large", 83.6))
)
