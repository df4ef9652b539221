"""VMamba as released by MzeroMiko/VMamba@2ed52ea (MIT): VSSM, Backbone_VSSM, VSSBlock, SS2D and its scan functions.

The released code encodes the parts of SS2D in strings such as "v05_noz"; ours are arguments.
"""

from __future__ import annotations

from torch import Tensor, nn

from ssmzoo.layers.image.patch_embed import resize_map
from ssmzoo.layers.image.ss2d import SS2D, HeadSS2D
from ssmzoo.models.vmamba import VMamba, VSSBlock
from ssmzoo.ops import cross_merge, cross_scan
from ssmzoo.released.image import ChannelsFirst, act_name, official_norm, official_stages
from ssmzoo.released.names import Names, add_prefix, cut_prefix
from ssmzoo.released.operators import FunctionModule

MODELS = (VMamba,)
TELLING_KEYS = r"(op|self_attention)\.x_proj_weight|classifier\.norm"
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


def official(state: dict[str, Tensor], **official_kwargs):
    """VSSM, Backbone_VSSM, VSSBlock, SS2D or (without weights) the scan functions; read off the checkpoint's keys."""
    if not state:
        return FunctionModule(cross_functions, **official_kwargs), {}
    state = to_ours(state)
    if "x_proj_weight" in state or "op.x_proj_weight" in state:
        build = official_ss2d if "x_proj_weight" in state else official_vss_block
        module = build(**official_kwargs)
        return module, add_prefix("module.", state) if isinstance(module, ChannelsFirst) else state
    return official_stages(VMamba, official_vssm, state, official_kwargs)


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


def official_vssm(
    patch_size: int = 4,
    in_chans: int = 3,
    num_classes: int = 1000,
    depths=(2, 2, 9, 2),
    dims=(96, 192, 384, 768),
    ssm_d_state: int = 16,
    ssm_ratio: float = 2.0,
    ssm_dt_rank="auto",
    ssm_act_layer="silu",
    ssm_conv: int = 3,
    ssm_conv_bias: bool = True,
    ssm_drop_rate: float = 0.0,
    ssm_init: str = "v0",
    forward_type: str = "v2",
    mlp_ratio: float = 4.0,
    mlp_act_layer="gelu",
    mlp_drop_rate: float = 0.0,
    gmlp: bool = False,
    drop_path_rate: float = 0.1,
    patch_norm: bool = True,
    norm_layer="LN",
    downsample_version: str = "v2",
    patchembed_version: str = "v1",
    use_checkpoint: bool = False,
    posembed: bool = False,
    imgsize: int = 224,
) -> dict:
    """Arguments of `VMamba` for the released VSSM's."""
    mixer = official_mixer(
        forward_type,
        ssm_d_state,
        ssm_ratio,
        ssm_dt_rank,
        ssm_conv,
        ssm_conv_bias,
        ssm_act_layer,
        ssm_init,
        ssm_drop_rate,
    )
    return dict(
        in_chans=in_chans,
        num_classes=num_classes,
        patch_size=patch_size,
        depths=depths,
        dims=dims,
        d_state=mixer.pop("d_state"),
        ssm_ratio=mixer.pop("ssm_ratio"),
        mixer=mixer,
        mlp_ratio=mlp_ratio,
        mlp={"act": act_name(mlp_act_layer), "gated": gmlp, "drop": mlp_drop_rate},
        norm=official_norm(norm_layer),
        stem={"v1": "patch", "v2": "conv"}[patchembed_version] + ("" if patch_norm else "_no_norm"),
        pos_embed=imgsize if posembed else None,
        downsample={"v1": "merge", "v2": "conv2", "v3": "conv3", "none": "none"}[downsample_version],
        drop_path_rate=drop_path_rate,
    )


def official_vss_block(
    hidden_dim: int,
    drop_path: float = 0.0,
    norm_layer="ln",
    channel_first: bool = False,
    ssm_d_state: int = 16,
    ssm_ratio: float = 2.0,
    ssm_dt_rank="auto",
    ssm_act_layer="silu",
    ssm_conv: int = 3,
    ssm_conv_bias: bool = True,
    ssm_drop_rate: float = 0.0,
    ssm_init: str = "v0",
    forward_type: str = "v2",
    mlp_ratio: float = 4.0,
    mlp_act_layer="gelu",
    mlp_drop_rate: float = 0.0,
    gmlp: bool = False,
    use_checkpoint: bool = False,
):
    options = official_mixer(
        forward_type,
        ssm_d_state,
        ssm_ratio,
        ssm_dt_rank,
        ssm_conv,
        ssm_conv_bias,
        ssm_act_layer,
        ssm_init,
        ssm_drop_rate,
    )
    mixer = (HeadSS2D if options.pop("heads", False) else SS2D)(hidden_dim, **options)
    mlp = {"act": act_name(mlp_act_layer), "gated": gmlp, "drop": mlp_drop_rate}
    block = VSSBlock(hidden_dim, mixer, mlp_ratio, official_norm(norm_layer), drop_path, mlp)
    return ChannelsFirst(block) if channel_first else block


def official_ss2d(
    d_model: int,
    d_state: int = 16,
    ssm_ratio: float = 2.0,
    dt_rank="auto",
    act_layer="silu",
    d_conv: int = 3,
    conv_bias: bool = True,
    dropout: float = 0.0,
    bias: bool = False,
    initialize: str = "v0",
    forward_type: str = "v2",
    channel_first: bool = False,
):
    if bias:
        raise ValueError("bias=True: no released SS2D has biases in its projections")
    options = official_mixer(
        forward_type, d_state, ssm_ratio, dt_rank, d_conv, conv_bias, act_layer, initialize, dropout
    )
    module = (HeadSS2D if options.pop("heads", False) else SS2D)(d_model, **options)
    return ChannelsFirst(module) if channel_first else module


def official_mixer(
    forward_type: str,
    d_state: int = 16,
    ssm_ratio: float = 2.0,
    dt_rank="auto",
    d_conv: int = 3,
    conv_bias: bool = True,
    act="silu",
    init: str = "v0",
    dropout: float = 0.0,
) -> dict:
    """Arguments of SS2D for the released class's; the released v0 ignores those of convolution, activation and init."""
    options = parse_forward_type(forward_type)
    if out_act := options.pop("out_act", None):
        options["out_norm"] = f"{options.get('out_norm', 'layer')}+{out_act}"
    if forward_type in ("v0", "v0seq"):
        d_conv, conv_bias, act, init = 3, True, "silu", "v0"
    return (
        dict(
            d_state=d_state,
            ssm_ratio=ssm_ratio,
            dt_rank=dt_rank,
            d_conv=d_conv,
            conv_bias=conv_bias,
            act=act_name(act),
            ssm_init=INITS[init],
            dropout=dropout,
        )
        | options
    )


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
