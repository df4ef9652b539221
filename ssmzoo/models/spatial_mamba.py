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

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ssmzoo.layers.image.backbone import FourStage, Stage, pool_map, stage_info
from ssmzoo.layers.image.drop_path import FusedDropPathAdd, drop_path_rates
from ssmzoo.layers.image.fused import (
    depthwise_conv,
    fused_depthwise,
    fused_gated_norm,
    fused_linear,
    fused_pointwise,
)
from ssmzoo.layers.image.mlp import Mlp
from ssmzoo.layers.image.patch_embed import check_image, map_norm
from ssmzoo.layers.image.ss2d import DepthwiseMapConv, init_directional_
from ssmzoo.layers.init import time_step_rank
from ssmzoo.layers.norm import fp32
from ssmzoo.layers.plain import is_plain
from ssmzoo.models.vmamba import init_linear
from ssmzoo.ops import linear_act, spatial_scan, state_fusion
from ssmzoo.ops.transforms import channels_last
from ssmzoo.suggest import from_slot


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


FUSIONS = frozenset({StateFusion})  # that the scan's operator takes along


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
        r = self.dt_rank = time_step_rank(dt_rank, d_model)
        self.in_proj = nn.Linear(d_model, 2 * e, bias=bias)
        self.conv2d = depthwise_conv(e, d_conv, bias=conv_bias)
        self.x_proj_weight = nn.Parameter(torch.empty(r + 2, e))
        self.dt_projs_weight = nn.Parameter(torch.empty(e, r))
        self.dt_projs_bias = nn.Parameter(torch.empty(e))
        self.A_logs = nn.Parameter(torch.empty(e, 1))
        self.Ds = nn.Parameter(torch.empty(e))
        self.state_fusion = StateFusion(e) if fuse_states else nn.Identity()
        self.out_norm = nn.LayerNorm(e)
        self.out_proj = nn.Linear(e, d_model, bias=bias)
        self.dropout = nn.Dropout(dropout)
        init_directional_(self)

    def forward(self, x: Tensor) -> Tensor:
        u, z = fused_linear(self.in_proj, x).chunk(2, dim=-1)  # (b y x e) each
        y = self.ssm(fused_depthwise(self.conv2d, u, "silu")).to(z.dtype)
        return self.dropout(fused_linear(self.out_proj, fused_gated_norm(self.out_norm, y, z)))

    def ssm(self, u: Tensor) -> Tensor:
        """States by one raster scan, fused on the map, then read out: (b y x e) -> (b y x e)"""
        steps = linear_act(u, self.x_proj_weight)  # (b y x r+2)
        dt, A, D = (self.dt_projs_weight, fp32(self.dt_projs_bias)), -torch.exp(fp32(self.A_logs)), self.Ds
        fusion = self.state_fusion
        if is_plain(fusion, among=FUSIONS):
            return spatial_scan(u, steps, *dt, A, D, fusion.kernels(), fusion.alpha)
        if isinstance(fusion, nn.Identity):
            return spatial_scan(u, steps, *dt, A, D, None, None)
        B, C = steps[..., :-1], steps[..., -1:]  # with the time step's rank in front of B
        h = spatial_scan(u, torch.cat([B, torch.ones_like(C)], dim=-1), *dt, A, 0 * D, None, None)
        return fusion(h.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) * C + D * u


class SpatialMambaBlock(nn.Module):
    """(b y x d) -> (b y x d), wired as in the header; `mixer` holds arguments of `StructureAwareSSM`."""

    def __init__(
        self, dim: int, mlp_ratio: float = 4.0, drop_path: float = 0.0, eps: float = 1e-5, mixer: dict | None = None
    ):
        super().__init__()
        self.cpe1 = depthwise_conv(dim)
        self.ln_1, self.ln_2 = nn.LayerNorm(dim, eps=eps), nn.LayerNorm(dim, eps=eps)
        self.self_attention = from_slot("mixer", mixer, StructureAwareSSM, dim)
        self.cpe2 = depthwise_conv(dim)
        self.mlp = Mlp(dim, int(mlp_ratio * dim))
        self.drop_path = FusedDropPathAdd(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = fused_depthwise(self.cpe1, x, residual=True)  # x + cpe1(x)
        x = self.drop_path(x, self.ln_1, self.self_attention)  # x + DropPath(mixer(ln_1(x)))
        x = fused_depthwise(self.cpe2, x, residual=True)
        return self.drop_path(x, self.ln_2, self.mlp)


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
        self.conv = nn.Conv2d(dim, out_dim, kernel, stride, kernel // 2, bias=bias)
        self.norm = nn.BatchNorm2d(out_dim) if norm else nn.Identity()
        self.act = nn.ReLU() if act else nn.Identity()
        self.pointwise = kernel == 1

    def forward(self, x: Tensor) -> Tensor:
        if self.pointwise:
            x = fused_pointwise(self.conv, x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        else:
            x = self.conv(x)
        return self.act(self.norm(x))


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
                DepthwiseMapConv(8 * dim, stride=2, act="relu", rectify=True),
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

    def train(self, mode: bool = True) -> SpatialMamba:
        super().train(mode)
        if self.freeze_batch_norm:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self
