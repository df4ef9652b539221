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

from ssmzoo.layers.image.backbone import FourStage, Stage
from ssmzoo.layers.image.drop_path import DropPath, drop_path_rates
from ssmzoo.layers.image.mlp import GatedMlp, Mlp
from ssmzoo.layers.image.patch_embed import PatchEmbed, check_image, map_norm, resize_map
from ssmzoo.layers.image.ss2d import SS2D, HeadSS2D
from ssmzoo.ops.transforms import channels_last


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

    def stem(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        return x if self.pos_embed is None else x + resize_map(self.pos_embed, x.shape[1:3])


def init_linear(module: nn.Module) -> None:
    """For `Module.apply`: every nn.Linear truncated normal with std 0.02 and zero bias."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
