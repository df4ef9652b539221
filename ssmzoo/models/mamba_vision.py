"""MambaVision: two stages of convolutions, then two of windows in which Mamba mixers and attention take turns.

    stages 1, 2     X <- X + DropPath(gamma BN(conv(GELU(BN(conv X)))))                            3x3, on the whole map
    stages 3, 4     X <- X + DropPath(gamma_1 mixer(LN X));   X <- X + DropPath(gamma_2 MLP(LN X))       in every window

The mixer is `MambaVisionMixer` (no gate, not causal) in the first half of a stage's blocks, rounded up, and attention
over the tokens of the window in the rest. A map that no whole number of windows covers is padded with zeros below and
right for the length of the stage. gamma (layer scale) is there from MambaVision-B on. As in the released initialiser,
the biases of the time step start from 0.

b batch, y x rows and columns, w side of a window, m number of windows, d width of the stage, h heads.
Source: Hatamizadeh & Kautz 2024 (arXiv 2407.08083); sizes as in NVlabs/MambaVision@7860a50 (NVIDIA Source Code
License-NC; nothing of it is here), whose tensor names ssmzoo.released.mamba_vision reads.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssmzoo.layers.image.backbone import FourStage, Stage, pool_map, stage_info
from ssmzoo.layers.image.drop_path import FusedDropPathAdd, drop_path_rates
from ssmzoo.layers.image.mamba_vision import MambaVisionMixer
from ssmzoo.layers.image.mlp import Mlp
from ssmzoo.layers.image.patch_embed import MapBatchNorm, check_image
from ssmzoo.layers.image.window_attention import from_windows, to_windows
from ssmzoo.models.vmamba import init_linear
from ssmzoo.ops.transforms import channels_last, scaled_dot_product_attention
from ssmzoo.suggest import from_slot


class Stem(nn.Module):
    """Images (b c y x) to maps (b y/4 x/4 d): two convolutions 3x3 of stride 2, each with BatchNorm and ReLU."""

    def __init__(self, in_chans: int, stem_dim: int, dim: int):
        super().__init__()
        self.in_chans = in_chans
        self.conv1, self.norm1 = nn.Conv2d(in_chans, stem_dim, 3, 2, 1, bias=False), nn.BatchNorm2d(stem_dim, eps=1e-4)
        self.conv2, self.norm2 = nn.Conv2d(stem_dim, dim, 3, 2, 1, bias=False), nn.BatchNorm2d(dim, eps=1e-4)

    def forward(self, x: Tensor) -> Tensor:
        check_image(x, self.in_chans, 1, "MambaVision")
        x = F.relu(self.norm1(self.conv1(channels_last(x))))
        return F.relu(self.norm2(self.conv2(x))).permute(0, 2, 3, 1)


class Downsample(nn.Module):
    """(b y x d) -> (b y/2 x/2 2d): a convolution 3x3 of stride 2; halves are rounded up."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv = nn.Conv2d(dim, 2 * dim, 3, 2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class ConvBlock(nn.Module):
    """(b y x d) -> (b y x d)"""

    def __init__(self, dim: int, drop_path: float = 0.0, layer_scale: float | None = None):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(dim, dim, 3, padding=1), nn.BatchNorm2d(dim)
        self.conv2, self.norm2 = nn.Conv2d(dim, dim, 3, padding=1), nn.BatchNorm2d(dim)
        self.gamma = scale_of(layer_scale, dim)
        self.drop_path = FusedDropPathAdd(drop_path, per_sample=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop_path(x, self.branch)

    def branch(self, x: Tensor) -> Tensor:
        x = self.conv1(x.permute(0, 3, 1, 2))
        x = self.conv2(F.gelu(self.norm1(x), approximate="tanh"))
        return scaled(self.norm2(x).permute(0, 2, 3, 1), self.gamma)


class Attention(nn.Module):
    """Every token of a window sees every other: (m l d) -> (m l d). qk_norm: LayerNorm of queries and keys per head"""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True, qk_norm: bool = False, proj_drop: float = 0.0):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"a stage of width {dim} has no {num_heads} heads; num_heads must divide it")
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=qkv_bias), nn.Linear(dim, dim)
        self.q_norm = nn.LayerNorm(dim // num_heads) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(dim // num_heads) if qk_norm else nn.Identity()
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # each (m h l p)
        y = scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.proj_drop(self.proj(y.transpose(1, 2).flatten(2)))


class WindowBlock(nn.Module):
    """A mixer and an MLP, pre-norm, on the tokens of windows: (m l d) -> (m l d)"""

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        mlp_ratio: float = 4.0,
        drop: float = 0.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
    ):
        super().__init__()
        self.norm1, self.mixer, self.gamma_1 = nn.LayerNorm(dim), mixer, scale_of(layer_scale, dim)
        self.norm2, self.gamma_2 = nn.LayerNorm(dim), scale_of(layer_scale, dim)
        self.mlp = Mlp(dim, int(mlp_ratio * dim), drop=drop)
        self.drop_path = FusedDropPathAdd(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop_path(self.drop_path(x, self.mix), self.feed)

    def mix(self, x: Tensor) -> Tensor:
        return scaled(self.mixer(self.norm1(x)), self.gamma_1)

    def feed(self, x: Tensor) -> Tensor:
        return scaled(self.mlp(self.norm2(x)), self.gamma_2)


class WindowStage(Stage):
    """A stage whose blocks see windows of w x w positions; (b y x d) -> (b y x d)"""

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module | None, window_size: int):
        super().__init__(blocks, downsample)
        self.window_size = window_size

    def forward(self, x: Tensor) -> Tensor:
        (height, width), w = x.shape[1:3], self.window_size
        x = F.pad(x, (0, 0, 0, -width % w, 0, -height % w))
        rows, columns = x.shape[1:3]
        x = super().forward(to_windows(x, w))  # (b*m w*w d)
        return from_windows(x, w, rows, columns)[:, :height, :width]


def scale_of(layer_scale: float | None, dim: int) -> nn.Parameter | None:
    return None if layer_scale is None else nn.Parameter(torch.full((dim,), float(layer_scale)))


def scaled(x: Tensor, gamma: Tensor | None) -> Tensor:
    return x if gamma is None else x * gamma


class MambaVision(FourStage):
    """Image classifier and feature pyramid. (b c y x) -> (b num_classes); the defaults are MambaVision-T.

    depths, embed_dim  blocks per stage; width of the first stage, doubled at every further one
    stem_dim           channels between the two convolutions of the stem
    conv_stages        how many stages have convolutions instead of windows
    num_heads          of the attention: per stage, or of the first stage (then doubled at every further one)
    window_size        side of the windows: per stage, or of all
    mlp_ratio          hidden width of the MLPs over their width
    mixer              further arguments of `MambaVisionMixer`
    attention          {"qkv_bias": True, "qk_norm": False}
    layer_scale        initial factor of the branches in windows, None for none; conv_layer_scale  of the others
    drop_rate          before the head; proj_drop_rate  behind the projections of attention and MLPs
    output_stride      the last map is 1 / output_stride of the image; 0: as the stages make it
    """

    first_conv = "patch_embed.conv1"

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depths: Sequence[int] = (1, 3, 8, 4),
        embed_dim: int = 80,
        stem_dim: int = 32,
        conv_stages: int = 2,
        num_heads: int | Sequence[int] = (2, 4, 8, 16),
        window_size: int | Sequence[int] = (8, 8, 14, 7),
        mlp_ratio: float = 4.0,
        mixer: dict | None = None,
        attention: dict | None = None,
        layer_scale: float | None = None,
        conv_layer_scale: float | None = None,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.2,
        output_stride: int = 0,
    ):
        super().__init__()
        stages = range(len(depths))
        heads = [num_heads * 2**i for i in stages] if isinstance(num_heads, int) else list(num_heads)
        windows = [window_size] * len(depths) if isinstance(window_size, int) else list(window_size)
        if not len(heads) == len(windows) == len(depths):
            raise ValueError(f"depths has {len(depths)} stages, num_heads {len(heads)} and window_size {len(windows)}")
        dims = [embed_dim * 2**i for i in stages]
        rates = iter(drop_path_rates(drop_path_rate, sum(depths)))

        def block(stage: int, i: int) -> nn.Module:
            d = dims[stage]
            if stage < conv_stages:
                return ConvBlock(d, next(rates), conv_layer_scale)
            if i < depths[stage] - depths[stage] // 2:
                options = {"d_state": 8, "d_conv": 3, "expand": 1} | dict(mixer or {})
                layer = from_slot("mixer", options, MambaVisionMixer, d)
            else:
                layer = from_slot("attention", attention, Attention, d, heads[stage], proj_drop=proj_drop_rate)
            return WindowBlock(d, layer, mlp_ratio, proj_drop_rate, next(rates), layer_scale)

        def stage(i: int) -> Stage:
            blocks = [block(i, j) for j in range(depths[i])]
            down = Downsample(dims[i]) if i + 1 < len(dims) else None
            return Stage(blocks, down) if i < conv_stages else WindowStage(blocks, down, windows[i])

        self.patch_embed = Stem(in_chans, stem_dim, embed_dim)
        self.layers = nn.ModuleList(stage(i) for i in stages)
        self.norm = MapBatchNorm(dims[-1])
        self.head_drop = nn.Dropout(drop_rate)
        self.dims, self.num_features = tuple(dims), dims[-1]
        self.feature_info = stage_info(self.layers, dims, 4, output_stride=output_stride)
        self.reset_classifier(num_classes, global_pool)
        self.apply(init_linear)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (b c y x) -> normed last map (b d y/32 x/32)"""
        return self.norm(self.forward_stages(x)[-1]).permute(0, 3, 1, 2)

    def forward_stages(self, x: Tensor, stop: int | None = None) -> list[Tensor]:
        """Images (b c y x) -> the map of every stage before its downsampling, (b y/4 x/4 d), (b y/8 x/8 2d), ..."""
        x, maps = self.patch_embed(x), []  # (b y/4 x/4 d)
        for i, stage in enumerate(itertools.islice(self.layers, stop)):
            if i:
                x = self.layers[i - 1].downsample(x)  # (b y x d) -> (b y/2 x/2 2d)
            x = stage(x)
            maps.append(x)
        return maps

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.head_drop(pool_map(x, self.global_pool))
        return x if pre_logits else self.head(x)
