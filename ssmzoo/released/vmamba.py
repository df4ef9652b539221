"""VMamba as released by MzeroMiko/VMamba@2ed52ea (MIT): VSSM, Backbone_VSSM, VSSBlock, SS2D and its scan functions.

The released code encodes the parts of SS2D in strings such as "v05_noz"; ours are arguments.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ssmzoo.layers.image.patch_embed import resize_map
from ssmzoo.layers.image.ss2d import SS2D, HeadSS2D
from ssmzoo.models.vmamba import VMamba, VSSBlock
from ssmzoo.ops import cross_merge, cross_scan
from ssmzoo.released.arguments import INITIAL, RECOMPUTE, Arguments
from ssmzoo.released.catalogue import Asset, Picture, Weights
from ssmzoo.released.image import (
    LOADED,
    RUNNER,
    ChannelsFirst,
    act_name,
    is_pyramid,
    official_norm,
    official_stages,
    one_of,
    with_bias,
)
from ssmzoo.released.infer import count, part, ratio
from ssmzoo.released.names import Names, add_prefix, cut_prefix
from ssmzoo.released.operators import FunctionModule

MODELS = (VMamba,)
TELLING_KEYS = r"(op|self_attention)\.x_proj_weight|classifier\.norm"
WRAPPERS = ("model", "state_dict", "model_ema")  # the averaged weights were copied into `model` before the release
YIELDS_TO = (
    "mambair",
    "mambair_v2",
    "spatial_mamba",
    "res_vmamba",
    "mamba_fscil",
)
SUFFIXES = (("_no32", {}), ("_oact", {"out_act": "gelu"}), ("_noz", {"gate": None}), ("_nozact", {"gate": "linear"}))
NORM_TAGS = (
    ("_onnone", "none"),
    ("_ondwconv3", "conv"),
    ("_oncnorm", "layer_conv"),
    ("_onsoftmax", "softmax"),
    ("_onsigmoid", "sigmoid"),
)
SAME = ("v01", "v02", "v03", "v04", "v05")  # one computation, different kernels
FORMS = {
    "v051d": {"scans": "unidirectional"},
    "v052d": {"scans": "bidirectional"},
    "v052dc": {"scans": "cascade"},
    "m0": {"heads": True},
} | {form: {} for form in SAME}
INITS = {"v0": "mamba", "v1": "normal", "v2": "zero"}


FIRST_RELEASE = Names(("{at}ln_1.{p}", "{at}norm.{p}"), ("{at}self_attention.{rest}", "{at}op.{rest}"))
STEMS = {
    "patch": (("patch_embed.0.{p}", "patch_embed.proj.{p}"), ("patch_embed.2.{p}", "patch_embed.norm.{p}")),
    "conv": (
        ("patch_embed.0.{p}", "patch_embed.proj.{p}"),
        ("patch_embed.2.{p}", "patch_embed.norm1.{p}"),
        ("patch_embed.5.{p}", "patch_embed.conv2.{p}"),
        ("patch_embed.7.{p}", "patch_embed.norm2.{p}"),
    ),
}
HEAD = (("classifier.norm.{p}", "norm.{p}"), ("classifier.head.{p}", "head.{p}"))
CONV_DOWNSAMPLE = (
    ("layers.{i}.downsample.1.{p}", "layers.{i}.downsample.conv.{p}"),
    ("layers.{i}.downsample.3.{p}", "layers.{i}.downsample.norm.{p}"),
)
OUT_NORM = (("{at}out_norm.1.{p}", "{at}out_norm.conv.{p}"), ("{at}out_norm.2.{p}", "{at}out_norm.1.conv.{p}"))
HEADS = (("{at}conv2d.1.{p}", "{at}conv2d.{p}"),)  # Mamba-2's recurrence: the convolution stands between permutations
FLAT = ("in_proj.weight", "out_proj.weight", "fc1.weight", "fc2.weight", "reduction.weight")  # or 1x1 convolutions


SCAN_INITIAL = {
    **{"dt_min": (0.001, INITIAL), "dt_max": (0.1, INITIAL), "dt_init": ("random", INITIAL)},
    **{"dt_scale": (1.0, INITIAL), "dt_init_floor": (1e-4, INITIAL)},
}
MIXER = {
    **{"ssm_d_state": 16, "ssm_ratio": 2.0, "ssm_dt_rank": "auto", "ssm_act_layer": "silu", "ssm_conv": 3},
    **{"ssm_conv_bias": True, "ssm_drop_rate": 0.0, "ssm_init": "v0", "forward_type": "v2"},
}
MLP = {"mlp_ratio": 4.0, "mlp_act_layer": "gelu", "mlp_drop_rate": 0.0, "gmlp": False}
WHOLE = (
    {"patch_size": 4, "in_chans": 3, "num_classes": 1000, "depths": (2, 2, 9, 2), "dims": (96, 192, 384, 768)}
    | MIXER
    | MLP
    | {"drop_path_rate": 0.1, "patch_norm": True, "norm_layer": "LN", "downsample_version": "v2"}
    | {"patchembed_version": "v1", "posembed": False, "imgsize": 224}
)
VSSM = Arguments("VSSM", WHOLE, {"use_checkpoint": RECOMPUTE, **RUNNER})
PYRAMID = Arguments("Backbone_VSSM", WHOLE | {"norm_layer": "ln", "out_indices": (0, 1, 2, 3)}, VSSM.inert | LOADED)
BLOCK = Arguments(
    "VSSBlock",
    {"hidden_dim": 0, "drop_path": 0.0, "norm_layer": "ln", "channel_first": False, "post_norm": False} | MIXER | MLP,
    {"use_checkpoint": RECOMPUTE},
)
MIXER_ALONE = Arguments(
    "SS2D",
    {
        **{"d_model": 96, "d_state": 16, "ssm_ratio": 2.0, "dt_rank": "auto", "act_layer": "silu", "d_conv": 3},
        **{"conv_bias": True, "dropout": 0.0, "bias": False, "initialize": "v0", "forward_type": "v2"},
        "channel_first": False,
    },
    SCAN_INITIAL,
)
TABLES = (VSSM, PYRAMID, BLOCK, MIXER_ALONE)


def official(state: dict[str, Tensor], **given):
    """VSSM, Backbone_VSSM, VSSBlock, SS2D or (without weights) the scan functions; read off the checkpoint's keys."""
    if not state:
        return FunctionModule(cross_functions, **given), {}
    state = to_ours(state)
    if "x_proj_weight" in state or is_block(state):
        make, table = (official_ss2d, MIXER_ALONE) if "x_proj_weight" in state else (official_vss_block, BLOCK)
        module = make(**table.complete(given))
        return module, add_prefix("module.", state) if isinstance(module, ChannelsFirst) else state
    return official_stages(build, state, (PYRAMID if is_pyramid(state, given) else VSSM).complete(given))


def is_block(state: dict[str, Tensor]) -> bool:
    """Are these the tensors of one VSSBlock (which may lack its scan branch or its MLP)?"""
    return "op.x_proj_weight" in state or ("norm2.weight" in state and "patch_embed.proj.weight" not in state)


def from_official(model: VMamba, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A released (or our own) state dict under our names, the position table resized to this model's grid."""
    state = to_ours(state) if is_released(state) else dict(state)
    if model.pos_embed is not None:
        state["pos_embed"] = resize_map(state["pos_embed"], model.pos_embed.shape[1:3])
    return state


def is_released(state: dict[str, Tensor]) -> bool:
    """Are these the released names of a classifier (of either generation)?"""
    return any(key.startswith("classifier.") or ".self_attention." in key for key in state)


def to_ours(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A released state dict (either generation) under our names."""
    stem = STEMS["conv" if any(key.startswith("patch_embed.5.") for key in state) else "patch"]
    names = Names(*HEAD, *stem, *CONV_DOWNSAMPLE, *OUT_NORM, *HEADS)
    state = names.to_ours(FIRST_RELEASE.to_ours(state))
    state = {key: value.flatten(1) if key.endswith(FLAT) else value for key, value in ungrouped(state).items()}
    return state | {key: value.permute(0, 2, 3, 1) for key, value in state.items() if key == "pos_embed"}


def ungrouped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Today's one-file code keeps the k scan directions' projections as one grouped layer: x_proj (k (r + 2n), e) and
    dt_projs (k e, r) become x_proj_weight (k r+2n e) and dt_projs_weight (k e r)."""
    found = {}
    for key, value in state.items():
        at, _, name = key.rpartition("op.")
        if name in ("x_proj.weight", "dt_projs.weight"):
            k = len(state[f"{at}op.dt_projs_bias"])
            found[f"{at}op.{name.replace('.', '_')}"] = value.flatten(1).unflatten(0, (k, -1))
        else:
            found[key] = value
    return found


def to_official(module: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names of the current release; linear layers as matrices, which both of its layouts read."""
    state = cut_prefix("backbone.", cut_prefix("module.", state))
    stem = STEMS["conv" if "patch_embed.conv2.weight" in state else "patch"]
    down = CONV_DOWNSAMPLE if any(".downsample.conv." in key for key in state) else ()
    heads = HEADS if any(isinstance(part, HeadSS2D) for part in module.modules()) else ()
    head = HEAD if "patch_embed.proj.weight" in state else ()  # a block has a norm of that name, too
    state = Names(*head, *stem, *down, *OUT_NORM, *heads).to_theirs(state)
    return state | {key: value.permute(0, 3, 1, 2) for key, value in state.items() if key == "pos_embed"}


def build(config: dict[str, Any]) -> VMamba:
    """The model; with ssm_ratio 0 its blocks lose their scan branch."""
    if config["ssm_ratio"] > 0:
        return VMamba(**arguments(config))
    model = VMamba(**arguments(config | {"ssm_ratio": 1.0}))
    for stage in model.layers:
        stage.blocks = nn.ModuleList(MlpBlock(block) for block in stage.blocks)
    return model


def arguments(config: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `VMamba` for the released VSSM's, all of them."""
    mixer = {key: config[key] for key in MIXER}
    mixer = scan_arguments(**{NAMES_OF_MIXER.get(key, key): value for key, value in mixer.items()})
    norms = "" if config["patch_norm"] else "_no_norm"
    return dict(
        in_chans=config["in_chans"],
        num_classes=config["num_classes"],
        patch_size=config["patch_size"],
        depths=config["depths"],
        dims=config["dims"],
        d_state=mixer.pop("d_state"),
        ssm_ratio=mixer.pop("ssm_ratio"),
        mixer=mixer,
        mlp_ratio=config["mlp_ratio"],
        mlp={"act": act_name(config["mlp_act_layer"]), "gated": config["gmlp"], "drop": config["mlp_drop_rate"]},
        norm=official_norm(config["norm_layer"]),
        stem=one_of(config, "patchembed_version", {"v1": "patch", "v2": "conv"}) + norms,
        pos_embed=config["imgsize"] if config["posembed"] else None,
        downsample=one_of(config, "downsample_version", DOWNSAMPLE),
        drop_path_rate=config["drop_path_rate"],
    )


DOWNSAMPLE = {"v1": "merge", "v2": "conv2", "v3": "conv3", "none": "none"}
NAMES_OF_MIXER = {  # the whole model's and the block's names of the mixer's arguments
    **{"ssm_d_state": "d_state", "ssm_dt_rank": "dt_rank", "ssm_act_layer": "act_layer", "ssm_conv": "d_conv"},
    **{"ssm_conv_bias": "conv_bias", "ssm_drop_rate": "dropout", "ssm_init": "initialize"},
}


def official_vss_block(hidden_dim, drop_path, norm_layer, channel_first, mlp_ratio, post_norm, **given):
    mixer = {NAMES_OF_MIXER.get(key, key): given[key] for key in MIXER}
    mlp = {"act": act_name(given["mlp_act_layer"]), "gated": given["gmlp"], "drop": given["mlp_drop_rate"]}
    block = (PostNormBlock if post_norm else VSSBlock)(
        hidden_dim,
        ss2d(hidden_dim, scan_arguments(**mixer)) if mixer["ssm_ratio"] > 0 else nn.Identity(),
        mlp_ratio,
        official_norm(norm_layer),
        drop_path,
        mlp,
    )
    block = block if mixer["ssm_ratio"] > 0 else MlpBlock(block)
    return ChannelsFirst(block) if channel_first else block


class PostNormBlock(VSSBlock):
    """x + DropPath(norm(op(x))), x + DropPath(norm2(mlp(x))): norms behind the branches."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop_path(x, self.op, self.norm)
        return x if self.mlp is None else self.drop_path(x, self.mlp, self.norm2)


class MlpBlock(nn.Module):
    """A block whose ssm_ratio is 0: no scan branch, x + DropPath(MLP(norm2(x)))."""

    def __init__(self, block: VSSBlock):
        super().__init__()
        if block.mlp is None:
            raise ValueError("ssm_ratio=0 and mlp_ratio=0 leave nothing in a block")
        self.norm2, self.mlp, self.drop_path = block.norm2, block.mlp, block.drop_path

    def forward(self, x: Tensor) -> Tensor:
        return self.drop_path(x, self.norm2, self.mlp)


def official_ss2d(d_model, bias, channel_first, **given):
    module = ss2d(d_model, scan_arguments(**given))
    if bias:
        module.in_proj, module.out_proj = (with_bias(part) for part in (module.in_proj, module.out_proj))
    return ChannelsFirst(module) if channel_first else module


def ss2d(d: int, options: dict[str, Any]) -> nn.Module:
    return (HeadSS2D if options.pop("heads", False) else SS2D)(d, **options)


def scan_arguments(forward_type, d_state, ssm_ratio, dt_rank, d_conv, conv_bias, act_layer, initialize, dropout):
    """Arguments of SS2D for the released class's; the released v0 ignores those of convolution, activation and init."""
    options = parse_forward_type(forward_type)
    if out_act := options.pop("out_act", None):
        options["out_norm"] = f"{options.get('out_norm', 'layer')}+{out_act}"
    if forward_type in ("v0", "v0seq"):
        d_conv, conv_bias, act_layer, initialize = 3, True, "silu", "v0"
    return {
        **{"d_state": d_state, "ssm_ratio": ssm_ratio, "dt_rank": dt_rank, "d_conv": d_conv, "conv_bias": conv_bias},
        **{"act": act_name(act_layer), "ssm_init": INITS[initialize], "dropout": dropout},
    } | options


def parse_forward_type(forward_type: str) -> dict:
    """The released `forward_type` string as arguments of SS2D. Suffixes are read from the end, in SUFFIXES' order."""
    rest, options = forward_type, {"gate": "act"}
    if rest in ("v0", "v0seq"):
        return options
    for suffix, meaning in SUFFIXES:
        if rest.endswith(suffix):
            rest, options = rest.removesuffix(suffix), options | meaning
    for suffix, norm in NORM_TAGS:
        if rest.endswith(suffix):
            rest, options["out_norm"] = rest.removesuffix(suffix), norm
    if rest not in FORMS:
        raise ValueError(
            f"forward_type is {forward_type!r}: {rest!r} is none of v0, v0seq, {', '.join(FORMS)}, or its "
            f"suffixes are not in the order that the released code reads: an output norm "
            f"({', '.join(t for t, _ in NORM_TAGS)}), _nozact, _noz, _oact, _no32"
        )
    return options | FORMS[rest]


def cross_functions(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """The released scan and merge functions on x (b c y x) and y (b 4 c y x), for the three layouts."""
    scans = [cross_scan(x, s) for s in ("cross", "unidirectional", "bidirectional")]
    merges = [cross_merge(y, s) for s in ("cross", "unidirectional", "bidirectional")]
    return scans[0], merges[0], scans[1], scans[2], merges[1], merges[2]


def infer(state: dict[str, Tensor], given: Mapping[str, Any]) -> dict[str, Any]:
    """All that shapes tell. Of `forward_type` they tell the gate and the kind of output norm; the order of the scan
    ("v051d", ...), "_oact" and norms without weights must be given by name."""
    if not state:
        return {}
    gated_mlp, ours = given.get("gmlp", False), to_ours(state)
    if "x_proj_weight" in ours:
        return {"d_model": len(ours["out_proj.weight"])} | infer_mixer(ours, given)
    if is_block(ours):
        d = len(ours["norm.weight" if "norm.weight" in ours else "norm2.weight"])
        return {"hidden_dim": d} | infer_block(ours, given, gated_mlp, d)
    depths = [count(ours, f"layers.{i}.blocks.#.") for i in range(count(ours, "layers.#."))]
    blocks = [part(ours, f"layers.{i}.blocks.0.") for i in range(len(depths))]
    dims = [len(b["norm.weight" if "norm.weight" in b else "norm2.weight"]) for b in blocks]
    stem = ours["patch_embed.proj.weight"].shape
    conv_stem = "patch_embed.conv2.weight" in ours
    inferred = {"depths": depths, "dims": dims, "in_chans": stem[1], "patchembed_version": "v2" if conv_stem else "v1"}
    inferred |= {"patch_size": 2 * (stem[2] - 1) if conv_stem else stem[2], "posembed": "pos_embed" in ours}
    inferred |= {"patch_norm": any(key.startswith("patch_embed.norm") for key in ours)}
    if "head.weight" in ours:
        inferred["num_classes"] = len(ours["head.weight"])
    if len(depths) > 1:
        kernel = ours.get("layers.0.downsample.conv.weight")
        merging = "v1" if "layers.0.downsample.reduction.weight" in ours else "none"
        inferred["downsample_version"] = merging if kernel is None else {2: "v2", 3: "v3"}[kernel.shape[-1]]
    if any("running_mean" in key for key in ours):
        inferred["norm_layer"] = "bn"
    return inferred | infer_block(blocks[0], given, gated_mlp, dims[0])


def infer_block(state: dict[str, Tensor], given: Mapping[str, Any], gated: bool, d: int) -> dict[str, Any]:
    mixer = part(state, "op.")
    inferred = {"ssm_ratio": 0.0, "mlp_ratio": 0.0}
    if mixer:
        names = {ours: theirs for theirs, ours in NAMES_OF_MIXER.items()}
        inferred |= {names.get(key, key): value for key, value in infer_mixer(mixer, given, "ssm_init").items()}
    if "mlp.fc2.weight" in state:
        inferred["mlp_ratio"] = ratio(state["mlp.fc2.weight"].shape[1], d)
        inferred["gmlp"] = len(state["mlp.fc1.weight"]) != state["mlp.fc2.weight"].shape[1]
    return inferred


def infer_mixer(state: dict[str, Tensor], given: Mapping[str, Any], init: str = "initialize") -> dict[str, Any]:
    d, e = state["out_proj.weight"].shape
    heads = state["A_logs"].shape[0] == 4 and state["A_logs"].ndim == 2 and "dt_projs_weight" not in state
    inferred = {"ssm_ratio": ratio(e, d), "d_conv": state["conv2d.weight"].shape[-1] if "conv2d.weight" in state else 1}
    inferred |= {"conv_bias": "conv2d.bias" in state}
    gate = "" if len(state["in_proj.weight"]) == 2 * e else "_noz"
    norm = "_oncnorm" if "out_norm.1.conv.weight" in state else "_ondwconv3" if "out_norm.conv.weight" in state else ""
    form = f"{'m0' if heads else 'v05'}{norm}{gate}"
    if "forward_type" not in given:
        inferred["forward_type"] = form
    if given.get("forward_type") in ("v0", "v0seq"):
        inferred = {key: value for key, value in inferred.items() if key not in ("d_conv", "conv_bias")}
    if heads:
        rank = state["A_logs"].shape[1]
        return inferred | {"dt_rank": rank, "d_state": (state["x_proj_weight"].shape[1] - rank) // 2}
    return inferred | rank_of(state["dt_projs_weight"].shape[-1], d) | {"d_state": state["A_logs"].shape[1]}


def rank_of(rank: int, d: int) -> dict[str, Any]:
    """The rank of the time step if it is not the one that "auto" means: stages of other widths have other ranks."""
    return {} if rank == math.ceil(d / 16) else {"dt_rank": rank}


RELEASE = "https://github.com/MzeroMiko/VMamba/releases/download/%23{tag}/{file}"
V2 = {"forward_type": "v05_noz", "ssm_d_state": 1, "ssm_conv_bias": False, "mlp_ratio": 4.0}
V2 |= {"downsample_version": "v3", "patchembed_version": "v2", "norm_layer": "ln2d"}
V0 = {"forward_type": "v0", "ssm_d_state": 16, "ssm_conv_bias": True, "mlp_ratio": 0.0}
V0 |= {"downsample_version": "v1", "patchembed_version": "v1", "norm_layer": "ln", "ssm_ratio": 2.0}
CATALOGUE = tuple(
    Weights(
        f"vmamba_{preset}",
        Asset(RELEASE.format(tag="v0cls" if "vanilla" in preset else "v2cls", file=file)),
        licence="mit",
        arguments=V0 if "vanilla" in preset else V2 | {"ssm_ratio": ratio},
        picture=Picture(),
        metric=f"ImageNet-1k top-1 {top1}",
    )
    for preset, file, top1, ratio in (
        ("tiny", "vssm1_tiny_0230s_ckpt_epoch_264.pth", 82.6, 1.0),
        ("tiny_s2l5", "vssm_tiny_0230_ckpt_epoch_262.pth", 82.5, 2.0),
        ("small", "vssm_small_0229_ckpt_epoch_222.pth", 83.6, 2.0),
        ("small_s1l20", "vssm1_small_0229s_ckpt_epoch_240.pth", 83.3, 1.0),
        ("base", "vssm_base_0229_ckpt_epoch_237.pth", 83.9, 2.0),
        ("base_s1l20", "vssm1_base_0229s_ckpt_epoch_225.pth", 83.8, 1.0),
        ("vanilla_tiny", "vssmtiny_dp01_ckpt_epoch_292.pth", 82.2, 2.0),
        ("vanilla_small", "vssmsmall_dp03_ckpt_epoch_238.pth", 83.5, 2.0),
        ("vanilla_base", "vssmbase_dp06_ckpt_epoch_241.pth", 83.7, 2.0),
    )
)
