"""VMamba: a four-stage image backbone whose token mixer scans the map in four directions (SS2D).

    X <- X + DropPath(SS2D(norm(X)))            X <- X + DropPath(MLP(norm2(X)))     (no MLP when mlp_ratio is 0)

Two generations of released weights differ in their parts, not in the wiring:

                  SS2D                        norm  stem             downsampling           MLP
    current       no gate, n = 1              ln    two conv 3x3     conv 3x3, stride 2     4 d
    vanilla       gated, n = 16, conv bias    ln    conv 4x4         patch merging          none

Everything is channels-last inside; the released channels-first form ("ln2d") computes the same numbers.
The released code encodes the parts in strings such as "v05_noz"; here they are arguments, and only `official_vmamba`
reads the strings. Odd maps: patch merging pads below and right, as the channels-last release does.

b batch, y x rows and columns, d width of the stage, n state size.
Source: Liu et al. 2024, VMamba (arXiv 2401.10166); released code MzeroMiko/VMamba@2ed52ea (MIT), written anew here.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssmzoo.deprecated import into, old_arguments
from ssmzoo.layers.image.backbone import FourStage, Stage, pool_map, stage_info
from ssmzoo.layers.image.drop_path import FusedDropPathAdd, drop_path_rates
from ssmzoo.layers.image.fused import conv_map
from ssmzoo.layers.image.mlp import make_mlp
from ssmzoo.layers.image.patch_embed import PatchEmbed, check_image, height_width, map_norm, resize_map
from ssmzoo.layers.image.ss2d import SS2D, HeadSS2D
from ssmzoo.ops.transforms import channels_last
from ssmzoo.suggest import argument_names, check_slot, from_slot

STEMS = ("conv", "patch", "conv_no_norm", "patch_no_norm")


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
        x = self.proj(channels_last(x))
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
        self.smallest, self.weights = 2 if kernel == 2 else 1, dim * out_dim * kernel**2
        self.conv = nn.Conv2d(dim, out_dim, kernel, stride=2, padding=kernel // 3)
        self.norm = map_norm(norm, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        if min(x.shape[1:3]) < self.smallest:
            raise ValueError(f"a map of {x.shape[1]}x{x.shape[2]} positions cannot be halved again; enlarge the images")
        return self.norm(conv_map(self.conv, x, self.weights))


def make_stem(kind: str, patch_size: int, in_chans: int, dim: int, norm: str) -> nn.Module:
    """ "conv" (`ConvStem`) or "patch" (`PatchEmbed`); "conv_no_norm" and "patch_no_norm" without norms."""
    form, bare, _ = kind.partition("_no_norm")
    if kind not in STEMS:
        raise ValueError(f"stem is {kind!r}; expected one of {', '.join(map(repr, STEMS))}")
    if form == "conv":
        return ConvStem(patch_size, in_chans, dim, None if bare else norm)
    return PatchEmbed(patch_size, in_chans, dim, norm=None if bare else map_norm(norm, dim))


def make_mixer(dim: int, d_state: int, ssm_ratio: float, options: dict | None) -> SS2D:
    """SS2D without gate and convolution bias unless `options` say so; its "heads" chooses `HeadSS2D`."""
    options = {"gate": None, "conv_bias": False} | dict(options or {})
    layer = HeadSS2D if options.pop("heads", False) else SS2D
    return from_slot("mixer", options, layer, dim, d_state, ssm_ratio)


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


@old_arguments(mlp_act=into("mlp", "act"), gmlp=into("mlp", "gated"), mlp_drop=into("mlp", "drop"))
class VSSBlock(nn.Module):
    """SS2D and an optional MLP, pre-norm. (b y x d) -> (b y x d)

    mixer  the token mixer (SS2D or another with its interface)
    mlp    {"act": "gelu", "gated": False, "drop": 0.0}
    """

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        mlp_ratio: float = 4.0,
        norm: str = "ln",
        drop_path: float = 0.0,
        mlp: dict | None = None,
    ):
        super().__init__()
        self.norm, self.op = map_norm(norm, dim), mixer
        self.drop_path = FusedDropPathAdd(drop_path, per_sample=norm == "ln")
        self.mlp = None
        check_slot("mlp", mlp, argument_names(make_mlp)[2:], "the MLP", TypeError)  # of blocks without one too
        if mlp_ratio > 0:
            self.norm2 = map_norm(norm, dim)
            self.mlp = make_mlp(dim, int(mlp_ratio * dim), **(mlp or {}))

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop_path(x, self.norm, self.op)  # x + DropPath(op(norm(x)))
        return x if self.mlp is None else self.drop_path(x, self.norm2, self.mlp)


def without_patch_norm(arguments: dict, patch_norm: bool) -> None:
    """What `patch_norm=False` is now."""
    if not patch_norm:
        arguments["stem"] = f"{arguments.get('stem', 'conv')}_no_norm"


def size_of_positions(arguments: dict, img_size: int | Sequence[int]) -> None:
    """What `img_size` is now: it only sized the position table."""
    if arguments.get("pos_embed"):
        arguments["pos_embed"] = img_size


@old_arguments(
    mlp_act=into("mlp", "act"),
    gmlp=into("mlp", "gated"),
    mlp_drop_rate=into("mlp", "drop"),
    patch_norm=without_patch_norm,
    img_size=size_of_positions,
)
class VMamba(FourStage):
    """Image classifier and feature pyramid. (b c y x) -> (b num_classes); the defaults are the paper's VMamba-T.

    depths, dims     blocks per stage; width per stage, or of the first one (then doubled at every stage)
    d_state, ssm_ratio, mlp_ratio   n, inner width of SS2D and of the MLP relative to d
    mixer            further arguments of `SS2D`; {"heads": True} takes Mamba-2's recurrence (`HeadSS2D`)
    mlp              {"act": "gelu", "gated": False, "drop": 0.0}: activation, gate and dropout of the MLP
    norm             "ln" or "bn"
    stem, downsample "conv" or "patch", with "_no_norm" behind it for a stem without norms; "conv3", "conv2", "merge"
                     or "none"
    output_stride    the last map is 1 / output_stride of the image, for dense heads; 0: as the stages make it
    pos_embed        image size, one number or (height, width), for which a learned position table is made (resized for
                     other images); True: 224, None: no table
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        patch_size: int = 4,
        depths: Sequence[int] = (2, 2, 8, 2),
        dims: int | Sequence[int] = 96,
        d_state: int = 1,
        ssm_ratio: float = 1.0,
        mixer: dict | None = None,
        mlp_ratio: float = 4.0,
        mlp: dict | None = None,
        norm: str = "ln",
        stem: str = "conv",
        downsample: str = "conv3",
        pos_embed: bool | int | Sequence[int] | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.2,
        output_stride: int = 0,
    ):
        super().__init__()
        dims = [dims * 2**i for i in range(len(depths))] if isinstance(dims, int) else list(dims)
        if len(dims) != len(depths):
            raise ValueError(f"depths has {len(depths)} stages but dims has {len(dims)}")
        rates, last = iter(drop_path_rates(drop_path_rate, sum(depths))), len(dims) - 1

        def block(d: int) -> VSSBlock:
            return VSSBlock(d, make_mixer(d, d_state, ssm_ratio, mixer), mlp_ratio, norm, next(rates), mlp)

        self.patch_embed = make_stem(stem, patch_size, in_chans, dims[0], norm)
        grid = [side // patch_size for side in height_width(224 if pos_embed is True else pos_embed or 224)]
        self.pos_embed = nn.Parameter(torch.zeros(1, *grid, dims[0])) if pos_embed else None
        self.layers = nn.ModuleList(
            Stage(
                [block(d) for _ in range(depth)],
                downsampling(downsample, d, dims[i + 1], norm) if i < last else None,
            )
            for i, (depth, d) in enumerate(zip(depths, dims))
        )
        self.norm = map_norm(norm, dims[-1])
        self.head_drop = nn.Dropout(drop_rate)
        self.dims, self.num_features = tuple(dims), dims[-1]
        self.feature_info = stage_info(self.layers, dims, patch_size, downsample != "none", output_stride)
        self.reset_classifier(num_classes, global_pool)
        self.apply(init_linear)
        if pos_embed:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (b c y x) -> normed last map (b d y/32 x/32)"""
        return self.norm(self.forward_stages(x)[-1]).permute(0, 3, 1, 2)

    def forward_stages(self, x: Tensor, stop: int | None = None) -> list[Tensor]:
        """Images (b c y x) -> the map of every stage before its downsampling, (b y/4 x/4 d), (b y/8 x/8 2d), ..."""
        x, maps = self.patch_embed(x), []  # (b y/4 x/4 d)
        if self.pos_embed is not None:
            x = x + resize_map(self.pos_embed, x.shape[1:3])
        for i, stage in enumerate(itertools.islice(self.layers, stop)):
            if i:
                x = self.layers[i - 1].downsample(x)  # (b y x d) -> (b y/2 x/2 2d)
            x = stage(x)
            maps.append(x)
        return maps

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.head_drop(pool_map(x, self.global_pool))
        return x if pre_logits else self.head(x)


def init_linear(module: nn.Module) -> None:
    """For `Module.apply`: every nn.Linear truncated normal with std 0.02 and zero bias."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
