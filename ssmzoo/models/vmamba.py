"""VMamba: a four-stage image backbone whose token mixer scans the map in four orders (SS2D).

    X <- X + DropPath(SS2D(norm(X)))            X <- X + DropPath(MLP(norm2(X)))     (no MLP when mlp_ratio is 0)

Two generations of released weights differ in their parts, not in the wiring:

                  SS2D                        norm  stem             way down               MLP
    current       no gate, n = 1              ln    two conv 3x3     conv 3x3, stride 2     4 d
    vanilla       gated, n = 16, conv bias    ln    conv 4x4         patch merging          none

Everything is channels-last inside; the released channels-first form ("ln2d") computes the same numbers.
The released code encodes the parts in strings such as "v05_noz"; here they are arguments, and only `official_vmamba`
reads the strings. Odd maps: patch merging pads below and right, as the channels-last release does.

b batch, y x rows and columns, d width of the stage, n state size.
Source: Liu et al. 2024, VMamba (arXiv 2401.10166); released code MzeroMiko/VMamba@2ed52ea (MIT), written anew here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssmzoo.layers.image.backbone import FeaturePyramid, FourStage, Stage
from ssmzoo.layers.image.drop_path import DropPath, drop_path_rates
from ssmzoo.layers.image.mlp import GatedMlp, Mlp
from ssmzoo.layers.image.patch_embed import PatchEmbed, check_image, map_norm, resize_map
from ssmzoo.layers.image.ss2d import SS2D, HeadSS2D
from ssmzoo.official import FunctionModule
from ssmzoo.ops import cross_merge, cross_scan


class ConvStem(nn.Module):
    """Images (b c y x) to maps (b y/4 x/4 d): two convolutions of stride patch_size / 2, norms, GELU between them."""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int, norm: str | None):
        super().__init__()
        stride = patch_size // 2
        self.in_chans = in_chans
        self.proj = nn.Conv2d(in_chans, embed_dim // 2, stride + 1, stride, padding=1)
        self.norm1 = map_norm(norm, embed_dim // 2) if norm else nn.Identity()
        self.conv2 = nn.Conv2d(embed_dim // 2, embed_dim, stride + 1, stride, padding=1)
        self.norm2 = map_norm(norm, embed_dim) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        check_image(x, self.in_chans, 1, "VMamba")
        x = self.proj(x.contiguous(memory_format=torch.channels_last))
        x = F.gelu(self.norm1(x.permute(0, 2, 3, 1)))
        return self.norm2(self.conv2(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class PatchMerging(nn.Module):
    """(b y x d) -> (b y/2 x/2 d_out): every 2x2 neighbourhood in one vector, norm, linear. Odd sides get a 0."""

    def __init__(self, dim: int, out_dim: int, norm: str):
        super().__init__()
        self.norm, self.reduction = map_norm(norm, 4 * dim), nn.Linear(4 * dim, out_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        corners = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]  # rows first
        return self.reduction(self.norm(torch.cat(corners, dim=-1)))


class ConvDown(nn.Module):
    """(b y x d) -> (b y' x' d_out): convolution of stride 2 and a norm. y' = y // 2 (kernel 2) or ceil(y / 2) (3)"""

    def __init__(self, dim: int, out_dim: int, kernel: int, norm: str):
        super().__init__()
        self.conv = nn.Conv2d(dim, out_dim, kernel, stride=2, padding=kernel // 3)
        self.norm = map_norm(norm, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        if min(x.shape[1:3]) < self.conv.kernel_size[0] - 2 * self.conv.padding[0]:
            raise ValueError(f"a map of {x.shape[1]}x{x.shape[2]} positions cannot be halved again; enlarge the images")
        x = x.permute(0, 3, 1, 2)
        if x.numel() < self.conv.weight.numel():
            x = x.contiguous()  # rows last, as the weights are: torch would rearrange these, at greater cost
        return self.norm(self.conv(x).permute(0, 2, 3, 1))


def downsampling(kind: str, dim: int, out_dim: int, norm: str) -> nn.Module:
    """'merge' (patch merging), 'conv2' or 'conv3' (that kernel, stride 2), 'none'."""
    if kind == "none":
        if dim != out_dim:
            raise ValueError(f"downsample='none' keeps the width, but dims go from {dim} to {out_dim}; give equal dims")
        return nn.Identity()
    if kind == "merge":
        return PatchMerging(dim, out_dim, norm)
    if kind in ("conv2", "conv3"):
        return ConvDown(dim, out_dim, int(kind[-1]), norm)
    raise ValueError(f"downsample is {kind!r}; expected 'merge', 'conv2', 'conv3' or 'none'")


class VSSBlock(nn.Module):
    """SS2D and an optional MLP, pre-norm. (b y x d) -> (b y x d)

    mixer  the token mixer (SS2D or one of its kind)
    """

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        mlp_ratio: float = 4.0,
        mlp_act: str = "gelu",
        gmlp: bool = False,
        norm: str = "ln",
        drop_path: float = 0.0,
        mlp_drop: float = 0.0,
    ):
        super().__init__()
        self.norm, self.op, self.drop_path = map_norm(norm, dim), mixer, DropPath(drop_path, apart=norm == "ln")
        if mlp_ratio > 0:
            self.norm2 = map_norm(norm, dim)
            self.mlp = (GatedMlp if gmlp else Mlp)(dim, int(mlp_ratio * dim), mlp_act, mlp_drop)
        else:
            self.mlp = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop_path.add(x, lambda x: self.op(self.norm(x)))
        return x if self.mlp is None else self.drop_path.add(x, lambda x: self.mlp(self.norm2(x)))


class VMamba(FourStage):
    """Image classifier and feature pyramid. (b c y x) -> (b num_classes); the defaults are the paper's VMamba-T.

    depths, dims     blocks per stage; width per stage, or of the first one (then doubled at every stage)
    d_state, ssm_ratio, mlp_ratio   n, inner width of SS2D and of the MLP relative to d
    mixer            further arguments of `SS2D`; {"heads": True} takes Mamba-2's recurrence (`HeadSS2D`)
    mlp_act, gmlp    activation of the MLP; gated MLP
    norm             "ln" or "bn"
    stem, downsample "conv" or "patch"; "conv3", "conv2", "merge" or "none"
    output_stride    the last map is 1 / output_stride of the image, for dense heads; 0: as the stages make it
    pos_embed        a learned position table of the size of img_size, resized for other images
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        img_size: int = 224,
        patch_size: int = 4,
        depths: Sequence[int] = (2, 2, 8, 2),
        dims: int | Sequence[int] = 96,
        d_state: int = 1,
        ssm_ratio: float = 1.0,
        mixer: dict | None = None,
        mlp_ratio: float = 4.0,
        mlp_act: str = "gelu",
        gmlp: bool = False,
        norm: str = "ln",
        patch_norm: bool = True,
        stem: str = "conv",
        downsample: str = "conv3",
        pos_embed: bool = False,
        drop_rate: float = 0.0,
        mlp_drop_rate: float = 0.0,
        drop_path_rate: float = 0.2,
        output_stride: int = 0,
    ):
        super().__init__()
        if stem not in ("conv", "patch"):
            raise ValueError(f"stem is {stem!r}; expected 'conv' or 'patch'")
        dims = [dims * 2**i for i in range(len(depths))] if isinstance(dims, int) else list(dims)
        if len(dims) != len(depths):
            raise ValueError(f"depths has {len(depths)} stages but dims has {len(dims)}")
        options = {"gate": None, "conv_bias": False} | dict(mixer or {})
        layer = HeadSS2D if options.pop("heads", False) else SS2D
        rates = iter(drop_path_rates(drop_path_rate, sum(depths)))
        if stem == "conv":
            self.patch_embed = ConvStem(patch_size, in_chans, dims[0], norm if patch_norm else None)
        else:
            self.patch_embed = PatchEmbed(
                patch_size, in_chans, dims[0], norm=map_norm(norm, dims[0]) if patch_norm else None
            )
        grid = img_size // patch_size
        self.pos_embed = nn.Parameter(torch.zeros(1, grid, grid, dims[0])) if pos_embed else None
        self.layers = nn.ModuleList(
            Stage(
                [
                    VSSBlock(
                        d,
                        layer(d, d_state, ssm_ratio, **options),
                        mlp_ratio,
                        mlp_act,
                        gmlp,
                        norm,
                        next(rates),
                        mlp_drop_rate,
                    )
                    for _ in range(depth)
                ],
                downsampling(downsample, d, dims[i + 1], norm) if i + 1 < len(dims) else None,
            )
            for i, (depth, d) in enumerate(zip(depths, dims))
        )
        self.norm = map_norm(norm, dims[-1])
        self.init_stages(dims, patch_size, downsample != "none", output_stride)
        self.init_head(dims[-1], num_classes, global_pool, drop_rate)
        self.apply(init_linear)
        if pos_embed:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def from_official(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        state = rename_official(state) if any(key.startswith("classifier.") for key in state) else dict(state)
        if self.pos_embed is not None:
            state["pos_embed"] = resize_map(state["pos_embed"], self.pos_embed.shape[1:3])
        return state

    def stem(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        return x if self.pos_embed is None else x + resize_map(self.pos_embed, x.shape[1:3])


def init_linear(module: nn.Module) -> None:
    """For `Module.apply`: every nn.Linear truncated normal with std 0.02 and zero bias."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


# ---- released checkpoints ------------------------------------------------------------------------------------------

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


def act_name(act) -> str:
    """'silu' from 'silu', nn.SiLU or a description such as 'gelu (class torch.nn.GELU)'."""
    name = act if isinstance(act, str) else getattr(act, "__name__", type(act).__name__)
    return name.split()[0].lower()


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


class ChannelsFirst(nn.Module):
    """A channels-last module for (b d y x) maps."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


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
    block = VSSBlock(
        hidden_dim, mixer, mlp_ratio, act_name(mlp_act_layer), gmlp, official_norm(norm_layer), drop_path, mlp_drop_rate
    )
    return ChannelsFirst(block) if channel_first else block


def official_norm(norm_layer) -> str:
    """'ln' or 'bn' from the released 'ln', 'ln2d', 'bn' or a class."""
    return "bn" if "bn" in act_name(norm_layer) or "batch" in act_name(norm_layer) else "ln"


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
        img_size=imgsize,
        patch_size=patch_size,
        depths=depths,
        dims=dims,
        d_state=mixer.pop("d_state"),
        ssm_ratio=mixer.pop("ssm_ratio"),
        mixer=mixer,
        mlp_ratio=mlp_ratio,
        mlp_act=act_name(mlp_act_layer),
        gmlp=gmlp,
        norm=official_norm(norm_layer),
        patch_norm=patch_norm,
        stem={"v1": "patch", "v2": "conv"}[patchembed_version],
        pos_embed=posembed,
        mlp_drop_rate=mlp_drop_rate,
        downsample={"v1": "merge", "v2": "conv2", "v3": "conv3", "none": "none"}[downsample_version],
        drop_path_rate=drop_path_rate,
    )


CONV_STEM = {
    "patch_embed.0.": "patch_embed.proj.",
    "patch_embed.2.": "patch_embed.norm1.",
    "patch_embed.5.": "patch_embed.conv2.",
    "patch_embed.7.": "patch_embed.norm2.",
}
RENAMED = {
    "patch_embed.0.": "patch_embed.proj.",
    "patch_embed.2.": "patch_embed.norm.",
    "classifier.": "",
    ".downsample.1.": ".downsample.conv.",
    ".downsample.3.": ".downsample.norm.",
    "conv2d.1.": "conv2d.",
    "ln_1.": "norm.",
    "self_attention.": "op.",
}


def rename_official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A released VMamba state dict (either generation) under our names."""
    renamed = RENAMED | (CONV_STEM if any(key.startswith("patch_embed.5.") for key in state) else {})
    normed = any(key.endswith("out_norm.0.bias") for key in state)  # LayerNorm, then convolution
    ours = {}
    for key, value in state.items():
        for old, new in renamed.items():
            key = key.replace(old, new)
        parent, found, _ = key.rpartition("out_norm.")
        if found and value.ndim == 4:
            key = f"{parent}out_norm.{'1.' if normed else ''}conv.weight"
        elif key.endswith(("in_proj.weight", "out_proj.weight", "fc1.weight", "fc2.weight", "reduction.weight")):
            value = value.flatten(1)  # may be stored as a 1x1 convolution
        ours[key] = value.permute(0, 2, 3, 1) if key == "pos_embed" else value
    return ours


def cross_functions(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """The released scan and merge functions on x (b c y x) and y (b 4 c y x), for the three orders."""
    scans = [cross_scan(x, s) for s in ("cross", "unidirectional", "bidirectional")]
    merges = [cross_merge(y, s) for s in ("cross", "unidirectional", "bidirectional")]
    return scans[0], merges[0], scans[1], scans[2], merges[1], merges[2]


def official_vmamba(state: dict[str, Tensor], **official_kwargs):
    """VSSM, Backbone_VSSM, VSSBlock, SS2D or (without weights) the scan functions; read off the checkpoint's keys."""
    if not state:
        return FunctionModule(cross_functions, **official_kwargs), {}
    state = rename_official(state)
    if "x_proj_weight" in state or "op.x_proj_weight" in state:
        build = official_ss2d if "x_proj_weight" in state else official_vss_block
        module = build(**official_kwargs)
        prefix = "module." if isinstance(module, ChannelsFirst) else ""
        return module, {prefix + key: value for key, value in state.items()}
    return official_stages(VMamba, official_vssm, state, official_kwargs)


def official_stages(cls: type[FourStage], arguments, state: dict[str, Tensor], kwargs: dict):
    """A whole classifier, or its feature pyramid if the checkpoint has `outnorm` keys or out_indices are given."""
    pyramid = "out_indices" in kwargs or any(key.startswith("outnorm") for key in state)
    out_indices = kwargs.pop("out_indices", (0, 1, 2, 3))
    kwargs.pop("pretrained", None)
    model = cls(**arguments(**kwargs))
    if "pos_embed" in state and getattr(model, "pos_embed", None) is not None:
        state["pos_embed"] = resize_map(state["pos_embed"], model.pos_embed.shape[1:3])
    if not pyramid:
        return model, state
    model = FeaturePyramid(model, out_indices, official_norm(kwargs.get("norm_layer", "ln")))
    kept = model.state_dict()
    state = {key if key.startswith("outnorm") else f"backbone.{key}": value for key, value in state.items()}
    cut = ("backbone.layers", "backbone.norm", "backbone.head")  # what no tap needs
    return model, {key: value for key, value in state.items() if key in kept or not key.startswith(cut)}
