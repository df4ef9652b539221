"""Vim as released by hustvl/Vim (Apache-2.0): VisionMamba, and its bidirectional mixer alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ssmzoo.models.vim import Vim, VimMixer
from ssmzoo.released.arguments import DEVICE, KERNEL, Arguments
from ssmzoo.released.catalogue import Hub, Picture, Weights
from ssmzoo.released.fit import refuse_other_constants
from ssmzoo.released.image import RUNNER, infer_plain, layer_norms, one_of, resize_plain_positions
from ssmzoo.released.infer import part, ratio
from ssmzoo.released.vmamba import SCAN_INITIAL

MODELS = (Vim,)
TELLING_KEYS = r"A_b_log"
YIELDS_TO = ("shuffle_mamba",)
DIRECTIONS = {"v2": "both", "v1": "shared", "none": "forward"}
POOLS = {"none": "last", "mean": "avg", "max": "max_logits", "all": "all"}
WITHOUT = {
    **{"initializer_cfg": (None, "sets initial values"), "fused_add_norm": (True, KERNEL)},
    **{"residual_in_fp32": (True, "the residual stream is kept in fp32 here"), **DEVICE, **RUNNER},
}
MODEL = Arguments(
    "VisionMamba",
    {
        **{"img_size": 224, "patch_size": 16, "stride": 16, "depth": 24, "embed_dim": 192, "d_state": 16},
        **{"channels": 3, "num_classes": 1000, "ssm_cfg": None, "drop_rate": 0.0, "drop_path_rate": 0.1},
        **{"norm_epsilon": 1e-5, "rms_norm": True, "pt_hw_seq_len": 14, "if_bidirectional": False},
        **{"final_pool_type": "none", "if_abs_pos_embed": True, "if_rope": False, "if_rope_residual": False},
        **{"if_bimamba": False, "bimamba_type": "v2", "if_cls_token": True, "if_divide_out": True},
        **{"init_layer_scale": None, "use_double_cls_token": False, "use_middle_cls_token": True},
    },
    WITHOUT
    | {"ft_seq_len": (None, "the grid that the rotary table is made for; positions follow the image here")}
    | {"if_devide_out": (None, "a misspelling in the released vim_base, which the class swallows")},
    {"flip_img_sequences_ratio": (-1.0, "sequences reversed at random, in evaluation too, are not offered")},
)
MIXER = Arguments(
    "Mamba",  # of the fork mamba-1p1p1
    {
        **{"d_state": 16, "d_conv": 4, "expand": 2, "dt_rank": "auto", "conv_bias": True, "bias": False},
        **{"bimamba_type": "none", "if_divide_out": False, "init_layer_scale": None, "use_fast_path": True},
    },
    SCAN_INITIAL | {"layer_idx": (None, "names the block in a cache"), **DEVICE},
    required=("d_model",),
)
TABLES = (MODEL, MIXER)


def official(state: dict[str, Tensor], **given):
    """VisionMamba, or its mixer alone, by the keys present."""
    if "in_proj.weight" in state:
        arguments, slow = mixer_arguments(given)
        return slow_path(VimMixer(**arguments), slow), state
    config = MODEL.complete(given)
    arguments, slow = model_arguments(config)
    model = layer_norms(Vim(**arguments), True, config["norm_epsilon"])
    return slow_path(model, slow), from_official(model, state)


def from_official(model: Vim, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A released (or our own) state dict under our names, positions resized to this model's grid."""
    state = dict(state)
    if rotary := {key: state.pop(key) for key in list(state) if key.startswith("rope.")}:
        angles = released_angles(model.grid, model.embed_dim, model.rope_options.reference)
        refuse_other_constants(rotary, {"rope.freqs_cos": angles.cos(), "rope.freqs_sin": angles.sin()})
    if "cls_token_head" in state:
        state["cls_token"] = torch.cat([state.pop("cls_token_head"), state.pop("cls_token_tail")], dim=1)
    return resize_plain_positions(model, state)


def model_arguments(config: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """Arguments of `Vim` for the released VisionMamba's, and whether its mixers take the released slow path."""
    token = "double" if config["use_double_cls_token"] else "middle" if config["use_middle_cls_token"] else "head"
    options = {"if_divide_out": config["if_divide_out"], "init_layer_scale": config["init_layer_scale"]}
    options["bimamba_type"] = "v1" if config["if_bimamba"] else config["bimamba_type"]
    d = {"d_model": config["embed_dim"], "d_state": config["d_state"]}
    mixer, slow = mixer_arguments(d | options | dict(config["ssm_cfg"] or {}))
    del mixer["d_model"]
    return dict(
        in_chans=config["channels"],
        num_classes=config["num_classes"],
        img_size=config["img_size"],
        patch_size=config["patch_size"],
        stride=config["stride"],
        embed_dim=config["embed_dim"],
        depth=config["depth"],
        d_state=mixer.pop("d_state"),
        class_token=token if config["if_cls_token"] else "none",
        global_pool="token" if config["if_cls_token"] else one_of(config, "final_pool_type", POOLS),
        mixer=mixer,
        norm="rms" if config["rms_norm"] else "ln",
        pos_embed=config["if_abs_pos_embed"],
        rope=("stream" if config["if_rope_residual"] else "branch") if config["if_rope"] else None,
        rope_options={"reference": config["pt_hw_seq_len"], "from_second": True},
        paired=config["if_bidirectional"],
        drop_rate=config["drop_rate"],
        drop_path_rate=config["drop_path_rate"],
    ), slow


def mixer_arguments(given: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """Arguments of `VimMixer` for the released Mamba's, and whether that takes its slow path."""
    config = MIXER.complete(given)
    slow = not config.pop("use_fast_path")
    config["directions"] = one_of(config, "bimamba_type", DIRECTIONS)
    del config["bimamba_type"]
    return config | {"halve": config.pop("if_divide_out"), "layer_scale": config.pop("init_layer_scale")}, slow


def slow_path(model: nn.Module, slow: bool) -> nn.Module:
    """use_fast_path=False: the released slow path scans forwards only, and leaves the other parameters unused."""
    for module in model.modules() if slow else ():
        if isinstance(module, VimMixer):
            module.directions = "forward"
    return model


def infer(state: dict[str, Tensor], given: Mapping[str, Any]) -> dict[str, Any]:
    """What has weights. The position of the class token, the pooling, if_divide_out and if_rope_residual have none."""
    if "in_proj.weight" in state:
        return {"d_model": len(state["out_proj.weight"])} | infer_mixer(state)
    double = "cls_token_head" in state
    tokens = 2 if double else state["cls_token"].shape[1] if "cls_token" in state else 0
    inferred = infer_plain(state, given, tokens, MODEL.default("stride"))
    if not inferred:
        return {}
    mixer = infer_mixer(part(state, "layers.0.mixer."))
    inferred |= {"if_cls_token": tokens > 0, "use_double_cls_token": double, "if_abs_pos_embed": "pos_embed" in state}
    inferred |= {"d_state": mixer.pop("d_state"), "bimamba_type": mixer.pop("bimamba_type")}
    inferred["if_rope"] = any(key.startswith("rope.") for key in state)
    if "d_state" in (given.get("ssm_cfg") or {}) or given.get("if_bimamba"):
        inferred = {key: value for key, value in inferred.items() if key not in ("d_state", "bimamba_type")}
    return inferred | {"ssm_cfg": mixer}


def infer_mixer(state: dict[str, Tensor]) -> dict[str, Any]:
    e, n = state["A_log"].shape
    kind = "v2" if "conv1d_b.weight" in state else "v1" if "A_b_log" in state else "none"
    return {
        **{"d_state": n, "d_conv": state["conv1d.weight"].shape[-1], "expand": ratio(e, len(state["out_proj.weight"]))},
        **{"dt_rank": state["dt_proj.weight"].shape[1], "bias": "in_proj.bias" in state, "bimamba_type": kind},
        "conv_bias": "conv1d.bias" in state,
    }


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


WRAPPERS = ("model", "state_dict", "model_ema")  # the best file was chosen, and is measured, by `model`
TINY = ("hustvl/Vim-tiny-midclstok", "757b3e9ff444134ea9a44dcf4c61a252d4758807")
SMALL = ("hustvl/Vim-small-midclstok", "44c393461368b766fdc822619d0ad8af7dc887fa")
BASE = ("hustvl/Vim-base-midclstok", "main")
CATALOGUE = tuple(
    Weights(
        f"vim_{preset}",
        Hub(repo, file, revision),
        **{"licence": "apache-2.0", "bytes": n, "sha256": digest, "picture": Picture()},
        arguments={"final_pool_type": "mean", "if_divide_out": True, "use_middle_cls_token": True, "stride": stride},
        metric=f"ImageNet-1k top-1 {top1}, top-5 {top5}",
    )
    for preset, (repo, revision), file, stride, top1, top5, n, digest in (
        (
            *("tiny", TINY, "vim_t_midclstok_76p1acc.pth", 16, 76.1, 93.0, 115_013_118),
            "fedb1e60267f3bc7b2a8443f2ddead8d39e019d10247a87252162b3789801fd5",
        ),
        (
            *("tiny_plus", TINY, "vim_t_midclstok_ft_78p3acc.pth", 8, 78.3, 94.2, 116_650_558),
            "9847490c5c3ca36cc38caf8be537b726f326a1b5b15764b0bde650934ac35b54",
        ),
        ("small", SMALL, "vim_s_midclstok_80p5acc.pth", 16, 80.5, 95.1, None, None),
        ("small_plus", SMALL, "vim_s_midclstok_ft_81p6acc.pth", 8, 81.6, 95.4, None, None),
        ("base", BASE, "vim_b_midclstok_81p9acc.pth", 16, 81.9, 95.8, None, None),
    )
)
