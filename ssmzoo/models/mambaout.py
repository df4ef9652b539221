"""MambaOut: VMamba's frame without its state space, the control for what a scan is worth in image models.

    X <- X + DropPath(W_2 (GELU(g) * [i, DWConv(c)])),      [g, i, c] = W_1 norm(X)

One gated convolution per block, no scan and no MLP; stem, downsampling, final norm and linear head are VMamba's, so
that both differ in their blocks alone (the release has an MLP for a head).

b batch, y x rows and columns, d width of the stage, e inner width.
Source: Yu & Wang 2024, MambaOut (arXiv 2405.07992); timm's `mambaout_*` compute the same maps (tests).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssmzoo.layers.image.backbone import FourStage, Stage, pool_map, stage_info
from ssmzoo.layers.image.drop_path import drop_path_rates
from ssmzoo.layers.image.patch_embed import map_norm
from ssmzoo.models.vmamba import ConvStem, VSSBlock, downsampling, init_linear


class GatedConv(nn.Module):
    """A depthwise convolution of the last conv_ratio d channels, the whole gated. (b y x d) -> (b y x d)"""

    def __init__(self, dim: int, expansion_ratio: float, kernel_size: int, conv_ratio: float):
        super().__init__()
        hidden, convolved = int(expansion_ratio * dim), int(conv_ratio * dim)
        if convolved > hidden or kernel_size % 2 == 0:
            raise ValueError(
                f"expansion_ratio={expansion_ratio}, conv_ratio={conv_ratio}, kernel_size={kernel_size}: the "
                "convolution takes no more than the inner channels, and its side is odd"
            )
        self.split = [hidden, hidden - convolved, convolved]
        self.fc1, self.fc2 = nn.Linear(dim, 2 * hidden), nn.Linear(hidden, dim)
        self.conv = nn.Conv2d(convolved, convolved, kernel_size, padding=kernel_size // 2, groups=convolved)

    def forward(self, x: Tensor) -> Tensor:
        g, i, c = self.fc1(x).split(self.split, dim=-1)  # (b y x e), (b y x e - c), (b y x c)
        c = self.conv(c.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.fc2(F.gelu(g) * torch.cat([i, c], dim=-1))


class MambaOut(FourStage):
    """Image classifier and feature pyramid. (b c y x) -> (b num_classes); the defaults are the paper's MambaOut-T.

    depths, dims     blocks per stage; width per stage, or of the first one (then doubled at every stage)
    expansion_ratio  inner width e relative to d | conv_ratio   convolved channels relative to d
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depths: Sequence[int] = (3, 3, 9, 3),
        dims: int | Sequence[int] = (96, 192, 384, 576),
        expansion_ratio: float = 8 / 3,
        kernel_size: int = 7,
        conv_ratio: float = 1.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.2,
    ):
        super().__init__()
        dims = [dims * 2**i for i in range(len(depths))] if isinstance(dims, int) else list(dims)
        if len(dims) != len(depths):
            raise ValueError(f"depths has {len(depths)} stages but dims has {len(dims)}")
        rates, last = iter(drop_path_rates(drop_path_rate, sum(depths))), len(dims) - 1

        def block(d: int) -> VSSBlock:
            return VSSBlock(d, GatedConv(d, expansion_ratio, kernel_size, conv_ratio), 0.0, "ln", next(rates))

        self.patch_embed = ConvStem(4, in_chans, dims[0], "ln")
        self.layers = nn.ModuleList(
            Stage([block(d) for _ in range(n)], downsampling("conv3", d, dims[i + 1], "ln") if i < last else None)
            for i, (n, d) in enumerate(zip(depths, dims))
        )
        self.norm, self.head_drop = map_norm("ln", dims[-1]), nn.Dropout(drop_rate)
        self.dims, self.num_features = tuple(dims), dims[-1]
        self.feature_info = stage_info(self.layers, dims, 4)
        self.reset_classifier(num_classes, global_pool)
        self.apply(init_linear)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (b c y x) -> normed last map (b d y/32 x/32)"""
        return self.norm(self.forward_stages(x)[-1]).permute(0, 3, 1, 2)

    def forward_stages(self, x: Tensor, stop: int | None = None) -> list[Tensor]:
        """Images (b c y x) -> the map of every stage before its downsampling, (b y/4 x/4 d), ..."""
        x, maps = self.patch_embed(x), []
        for i, stage in enumerate(itertools.islice(self.layers, stop)):
            if i:
                x = self.layers[i - 1].downsample(x)
            x = stage(x)
            maps.append(x)
        return maps

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.head_drop(pool_map(x, self.global_pool))
        return x if pre_logits else self.head(x)
