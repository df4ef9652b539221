"""Semantic segmentation: any image backbone of the zoo, and a head that names the class of every pixel.

    linear    L = W [x_0; up(x_1); ...; up(x_n)]                  one 1x1 convolution over all maps at the finest size
    upernet   P_n = Conv3x3 [x_n; up(Conv1x1(pool_s(x_n))), s = 1, 2, 3, 6]             pyramid pooling of the last map
              l_i = Conv1x1(x_i);  l_i <- l_i + up(l_{i+1}), from l_n = P_n down;  o_i = Conv3x3(l_i), o_n = P_n
              L = W dropout(Conv3x3 [o_0; up(o_1); ...; up(o_n)])
              in training also L' = W' dropout(Conv3x3(x_{n-1})), the auxiliary head

Every convolution but W and W' is followed by BatchNorm and ReLU; `up` is bilinear without aligned corners. Names under
`decode_head` and `auxiliary_head` are those of released checkpoints (mmsegmentation's).

b batch, k classes, y x rows and columns of the image, d_i s_i channels and stride of map i.
Source: Xiao et al. 2018 (UPerNet, arXiv 1807.10221); settings of Swin's recipe, which VMamba, Spatial-Mamba and
MambaVision follow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssmzoo.layers.image.dense_neck import DenseMaps
from ssmzoo.models.dense_network import DenseNetwork, build_backbone
from ssmzoo.suggest import nearest

HEADS = ("upernet", "linear")
POOL_SIZES = (1, 2, 3, 6)


class Segmentation(NamedTuple):
    """logits, auxiliary (b k y' x') at the finest map's size; auxiliary is None in evaluation and without that head"""

    logits: Tensor
    auxiliary: Tensor | None = None


def resized(x: Tensor, size: Sequence[int]) -> Tensor:
    """(b d y x) -> (b d *size), bilinear"""
    return x if x.shape[2:] == tuple(size) else F.interpolate(x, tuple(size), mode="bilinear", align_corners=False)


class ConvModule(nn.Module):
    """Convolution, BatchNorm, ReLU: (b d y x) -> (b d_out y x)"""

    def __init__(self, dim: int, out_dim: int, kernel: int):
        super().__init__()
        self.conv = nn.Conv2d(dim, out_dim, kernel, padding=kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(out_dim)

    def forward(self, x: Tensor) -> Tensor:
        x, bn = self.conv(x), self.bn
        if self.training and x[:, 0].numel() == 1:  # one value (a batch of one, pooled) has no variance
            return F.relu(F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=bn.eps))
        return F.relu(bn(x))


class PixelClassifier(nn.Module):
    """Base of the heads: dropout of whole channels and `conv_seg`.

    It is drawn with deviation 0.01 as published, where many channels add up, and 1 / sqrt(dim) below 128, where such
    small weights leave the backbone without gradients for hundreds of steps.
    """

    def __init__(self, dim: int, num_classes: int, drop_rate: float):
        super().__init__()
        self.dropout, self.conv_seg = nn.Dropout2d(drop_rate), nn.Conv2d(dim, num_classes, 1)
        nn.init.normal_(self.conv_seg.weight, std=0.01 if dim >= 128 else dim**-0.5)
        nn.init.zeros_(self.conv_seg.bias)

    def classify(self, x: Tensor) -> Tensor:
        return self.conv_seg(self.dropout(x))


class LinearHead(PixelClassifier):
    """Maps -> (b k y_0 x_0), one linear function of all of them"""

    def __init__(self, dims: Sequence[int], num_classes: int, channels: int = 0, drop_rate: float = 0.0):
        super().__init__(sum(dims), num_classes, drop_rate)

    def forward(self, maps: list[Tensor]) -> Tensor:
        return self.classify(torch.cat([resized(x, maps[0].shape[2:]) for x in maps], 1))


class UPerHead(PixelClassifier):
    """Maps -> (b k y_0 x_0), by pyramid pooling and a feature pyramid of `channels`"""

    def __init__(self, dims: Sequence[int], num_classes: int, channels: int = 512, drop_rate: float = 0.1):
        super().__init__(channels, num_classes, drop_rate)
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(s), ConvModule(dims[-1], channels, 1)) for s in POOL_SIZES
        )
        self.bottleneck = ConvModule(dims[-1] + len(POOL_SIZES) * channels, channels, 3)
        self.lateral_convs = nn.ModuleList(ConvModule(d, channels, 1) for d in dims[:-1])
        self.fpn_convs = nn.ModuleList(ConvModule(channels, channels, 3) for _ in dims[:-1])
        self.fpn_bottleneck = ConvModule(len(dims) * channels, channels, 3)

    def forward(self, maps: list[Tensor]) -> Tensor:
        merged = [self.pooled(maps[-1])]
        for x, lateral in zip(maps[-2::-1], reversed(self.lateral_convs)):  # finer and finer
            x = lateral(x)
            merged.insert(0, x + resized(merged[0], x.shape[2:]))
        merged[:-1] = [conv(x) for conv, x in zip(self.fpn_convs, merged)]
        finest = merged[0].shape[2:]
        return self.classify(self.fpn_bottleneck(torch.cat([resized(x, finest) for x in merged], 1)))

    def pooled(self, x: Tensor) -> Tensor:
        """Pyramid pooling: (b d y x) -> (b channels y x)"""
        pools = [resized(pool(x), x.shape[2:]) for pool in self.psp_modules]
        return self.bottleneck(torch.cat([x, *pools], 1))


class ConvHead(PixelClassifier):
    """The auxiliary head, on one map (b d y x) -> (b k y x)"""

    def __init__(self, dim: int, num_classes: int, channels: int, drop_rate: float = 0.1):
        super().__init__(channels, num_classes, drop_rate)
        self.convs = nn.ModuleList([ConvModule(dim, channels, 3)])

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.convs[0](x))


class Segmenter(DenseNetwork):
    """Images (b c y x) -> `Segmentation`, with logits at the size of the finest map; `segment` gives them per pixel.

    backbone     a model's configuration ({"_target_": ..., arguments}), the name of a preset, or a module
    num_classes  k, background included
    head         "upernet" or "linear"
    channels     width of UPerNet;  auxiliary  width of its auxiliary head, 0: none
    drop_rate    of whole channels in front of the classifier
    out_indices, tap   which maps, see `DenseMaps`

    Raises ValueError for backbones without maps, TypeError for unknown arguments of theirs.
    """

    def __init__(
        self,
        backbone: Mapping | str | nn.Module,
        num_classes: int = 150,
        head: str = "upernet",
        channels: int = 512,
        auxiliary: int = 256,
        drop_rate: float = 0.1,
        out_indices: Sequence[int] | None = None,
        tap: str = "stream",
    ):
        super().__init__()
        if head not in HEADS:
            raise ValueError(f"head = {head!r}{nearest(head, HEADS)}; choose one of {', '.join(HEADS)}")
        if num_classes < 2:
            raise ValueError(f"num_classes = {num_classes}; segmentation needs two classes or more")
        self.maps = DenseMaps(build_backbone(backbone), out_indices, tap)
        dims, self.num_classes = self.maps.dims, num_classes
        make = UPerHead if head == "upernet" else LinearHead
        self.decode_head = make(dims, num_classes, channels, drop_rate)
        self.auxiliary_head = None
        if head == "upernet" and auxiliary:
            self.auxiliary_head = ConvHead(dims[max(0, len(dims) - 2)], num_classes, auxiliary, drop_rate)

    def forward(self, x: Tensor) -> Segmentation:
        maps = self.maps(x)
        logits = self.decode_head(maps)
        if self.auxiliary_head is None or not self.training:
            return Segmentation(logits)
        return Segmentation(logits, self.auxiliary_head(maps[max(0, len(maps) - 2)]))

    def segment(self, x: Tensor) -> Tensor:
        """(b c y x) -> logits (b k y x)"""
        return resized(self.forward(x).logits, x.shape[2:])
