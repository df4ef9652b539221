"""Spatial-Mamba: one raster scan per block, whose hidden states are mixed with their neighbours before the read-out.

    x_t = exp(delta_t A) x_{t-1} + delta_t B_t u_t          one scan, rows from the top, one state per channel
    h   = a_1 DW_1(x) + a_2 DW_3(x) + a_3 DW_5(x)           depthwise 3x3, dilations 1, 3, 5, borders repeated
    y_t = C_t h_t + D u_t

so that the state of a position sees its surroundings in all directions without further scans. Around it:

    X <- X + cpe1(X);  X <- X + DropPath(mixer(LN(X)));  X <- X + cpe2(X);  X <- X + DropPath(MLP(LN(X)))

with two depthwise convolutions (positions; zero-padded), a ReLU and BatchNorm stem, and inverted bottlenecks between
the stages, all from MLLA. Nothing is merged or cached: the fusion always uses the weights of the moment (the released
code keeps a merged kernel from its first evaluation). The state size is 1; the released code supports no other.

b batch, y x rows and columns, l = y x, d width of the stage, e inner width of the mixer, r rank of the time step.
Source: Xiao et al. 2024 (arXiv 2410.15091); released code EdwardChasel/Spatial-Mamba@71221eb (Apache-2.0), rewritten.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ssmzoo.layers.image.backbone import FourStage, Stage
from ssmzoo.layers.image.depthwise_conv import DepthwiseConv, MapConv
from ssmzoo.layers.image.drop_path import DropPath, drop_path_rates
from ssmzoo.layers.image.mlp import Linear, Mlp
from ssmzoo.layers.image.patch_embed import check_image, map_norm
from ssmzoo.layers.image.ss2d import init_directional_
from ssmzoo.layers.norm import GatedLayerNorm, fp32
from ssmzoo.models.vmamba import init_linear
from ssmzoo.ops import linear_act, spatial_scan, state_fusion
from ssmzoo.ops.transforms import channels_last


class StateFusion(nn.Module):
    """h (b e y x) -> sum over i of alpha_i DW_i(h): depthwise 3x3 with dilation 1, 3, 5; all ones at the start."""

    def __init__(self, dim: int):
        super().__init__()
        self.kernel_3 = nn.Parameter(torch.ones(dim, 1, 3, 3))
        self.kernel_3_1 = nn.Parameter(torch.ones(dim, 1, 3, 3))
        self.kernel_3_2 = nn.Parameter(torch.ones(dim, 1, 3, 3))
        self.alpha = nn.Parameter(torch.ones(3))

    def kernels(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.kernel_3, self.kernel_3_1, self.kernel_3_2

    def forward(self, h: Tensor) -> Tensor:
        return state_fusion(h, self.kernels(), self.alpha)


class StructureAwareSSM(nn.Module):
    """Gated token mixer of channels-last maps (b y x d) -> (b y x d).

    expand, dt_rank    e / d; r, or "auto" = ceil(d / 16)
    d_conv, conv_bias  side and bias of the depthwise convolution | bias  of the two projections
    fuse_states        False leaves h = x: a plain raster-scan Mamba, for comparison
    """

    def __init__(
        self,
        d_model: int,
        expand: float = 2.0,
        dt_rank: int | str = "auto",
        d_conv: int = 3,
        conv_bias: bool = True,
        bias: bool = False,
        dropout: float = 0.0,
        fuse_states: bool = True,
    ):
        super().__init__()
        e = self.d_inner = int(expand * d_model)
        r = self.dt_rank = math.ceil(d_model / 16) if dt_rank == "auto" else int(dt_rank)
        self.in_proj = Linear(d_model, 2 * e, bias=bias)
        self.conv2d = DepthwiseConv(e, d_conv, bias=conv_bias, act="silu")
        self.x_proj_weight = nn.Parameter(torch.empty(r + 2, e))
        self.dt_projs_weight = nn.Parameter(torch.empty(e, r))
        self.dt_projs_bias = nn.Parameter(torch.empty(e))
        self.A_logs = nn.Parameter(torch.empty(e, 1))
        self.Ds = nn.Parameter(torch.empty(e))
        self.state_fusion = StateFusion(e) if fuse_states else nn.Identity()
        self.out_norm = GatedLayerNorm(e)
        self.out_proj = Linear(e, d_model, bias=bias)
        self.dropout = nn.Dropout(dropout)
        init_directional_(self)

    def forward(self, x: Tensor) -> Tensor:
        u, z = self.in_proj(x).chunk(2, dim=-1)
        y = self.out_norm(self.ssm(self.conv2d(u)).to(z.dtype), z)
        return self.dropout(self.out_proj(y))

    def ssm(self, u: Tensor) -> Tensor:
        """States by one raster scan, fused on the map, then read out: (b y x e) -> (b y x e)"""
        steps = linear_act(u, self.x_proj_weight)  # (b y x r+2)
        A = -torch.exp(fp32(self.A_logs))
        return spatial_scan(u, steps, self.dt_projs_weight, fp32(self.dt_projs_bias), A, self.Ds, *self.taps())

    def taps(self) -> tuple:
        """Kernels and weights of the fusion; None when states are left as they are."""
        fusion = self.state_fusion
        return (fusion.kernels(), fusion.alpha) if isinstance(fusion, StateFusion) else (None, None)


class SpatialMambaBlock(nn.Module):
    """(b y x d) -> (b y x d), wired as in the header; `mixer` holds arguments of `StructureAwareSSM`."""

    def __init__(
        self, dim: int, mlp_ratio: float = 4.0, drop_path: float = 0.0, eps: float = 1e-5, mixer: dict | None = None
    ):
        super().__init__()
        self.cpe1 = DepthwiseConv(dim, residual=True)
        self.ln_1, self.ln_2 = nn.LayerNorm(dim, eps=eps), nn.LayerNorm(dim, eps=eps)
        self.self_attention = StructureAwareSSM(dim, **(mixer or {}))
        self.cpe2 = DepthwiseConv(dim, residual=True)
        self.mlp = Mlp(dim, int(mlp_ratio * dim))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = self.cpe1(x)
        x = self.drop_path.add(x, lambda x: self.self_attention(self.ln_1(x)))
        x = self.cpe2(x)
        return self.drop_path.add(x, lambda x: self.mlp(self.ln_2(x)))


class PointConv(nn.Conv2d):
    """A 1x1 convolution of (b d y x) maps as the matrix product that it is."""

    def __init__(self, dim: int, out_dim: int, bias: bool):
        super().__init__(dim, out_dim, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return linear_act(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class ConvNorm(nn.Module):
    """Convolution, BatchNorm (`norm`; then without bias unless `bias`) and ReLU (`act`), on (b d y x)."""

    def __init__(
        self,
        dim: int,
        out_dim: int,
        kernel: int,
        stride: int = 1,
        norm: bool = True,
        act: bool = True,
        bias: bool = False,
    ):
        super().__init__()
        self.conv = (
            PointConv(dim, out_dim, bias)
            if kernel == 1
            else nn.Conv2d(dim, out_dim, kernel, stride, kernel // 2, bias=bias)
        )
        self.norm = nn.BatchNorm2d(out_dim) if norm else nn.Identity()
        self.act = nn.ReLU() if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


class Stem(nn.Module):
    """Images (b c y x) to maps (b y/4 x/4 d); halves are rounded up, so any size works."""

    def __init__(self, in_chans: int, dim: int):
        super().__init__()
        self.in_chans = in_chans
        self.conv1 = ConvNorm(in_chans, dim // 2, 3, stride=2)
        self.conv2 = nn.Sequential(ConvNorm(dim // 2, dim // 2, 3), ConvNorm(dim // 2, dim // 2, 3, act=False))
        self.conv3 = nn.Sequential(ConvNorm(dim // 2, 4 * dim, 3, stride=2), ConvNorm(4 * dim, dim, 1, act=False))

    def forward(self, x: Tensor) -> Tensor:
        check_image(x, self.in_chans, 1, "Spatial-Mamba")
        x = self.conv1(channels_last(x))
        return self.conv3(self.conv2(x) + x).permute(0, 2, 3, 1)


class Downsample(nn.Module):
    """(b y x d) -> (b y/2 x/2 2d): 1x1 to 8d, depthwise 3x3 of stride 2 between ReLUs, 1x1; halves are rounded up."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv = nn.ModuleList(
            [
                ConvNorm(dim, 8 * dim, 1, norm=False, act=False, bias=True),
                MapConv(8 * dim, stride=2, act="relu", rectify=True),
                ConvNorm(8 * dim, 2 * dim, 1, act=False, bias=True),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        widen, halve, narrow = self.conv
        x = halve(widen(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))  # (b y/2 x/2 8d)
        return narrow(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class SpatialMamba(FourStage):
    """Image classifier and feature pyramid. (b c y x) -> (b num_classes); the defaults are Spatial-Mamba-T.

    depths, embed_dim  blocks per stage; width of the first stage, doubled at every further one
    mixer              further arguments of `StructureAwareSSM`, e.g. {"fuse_states": False}
    norm               of the final map: "ln" or "bn"
    output_stride      the last map is 1 / output_stride of the image; 0: as the stages make it
    freeze_batch_norm  keep the BatchNorm statistics of stem and downsampling in training (small batches)
    """

    first_conv = "patch_embed.conv1.conv"

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depths: Sequence[int] = (2, 4, 8, 4),
        embed_dim: int = 64,
        mlp_ratio: float = 4.0,
        mixer: dict | None = None,
        norm: str = "ln",
        freeze_batch_norm: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.2,
        output_stride: int = 0,
    ):
        super().__init__()
        dims = [embed_dim * 2**i for i in range(len(depths))]
        rates = iter(drop_path_rates(drop_path_rate, sum(depths)))
        self.freeze_batch_norm = freeze_batch_norm
        self.patch_embed = Stem(in_chans, embed_dim)
        self.layers = nn.ModuleList(
            Stage(
                [SpatialMambaBlock(d, mlp_ratio, next(rates), mixer=mixer) for _ in range(depth)],
                Downsample(d) if i + 1 < len(dims) else None,
            )
            for i, (depth, d) in enumerate(zip(depths, dims))
        )
        self.norm = map_norm(norm, dims[-1])
        self.init_stages(dims, stride=4, output_stride=output_stride)
        self.init_head(dims[-1], num_classes, global_pool, drop_rate)
        self.apply(init_linear)

    def train(self, mode: bool = True) -> SpatialMamba:
        super().train(mode)
        if self.freeze_batch_norm:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self
