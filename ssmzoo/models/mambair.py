"""MambaIR: image restoration with a residual state-space backbone (super-resolution, denoising, JPEG removal).

What is unusual about it, against SwinIR whose frame it keeps:
- the token mixer is VMamba's four-direction selective scan (SS2D, gated, LayerNorm before the gate), no windows at all;
- in place of an MLP stands a convolution with channel attention (CAB), which restores locality and channel diversity;
- both branches are added to a residual stream that has a learned scale per channel:

    Z  = a1 * X + DropPath(SS2D(LN1(X)))            X' = a2 * Z + CAB(LN2(Z))

- `mlp_ratio` is the expansion of SS2D (int(C * mlp_ratio) channels), as in the released option files.

Any height and width of at least one pixel works: nothing is padded. The light head brings a light CAB along.
Source: Guo et al., MambaIR, arXiv 2402.15648 (ECCV 2024); released code MambaIR@33d7b34 (Apache-2.0), written anew.

Letters: b batch, y x rows and columns, l = y*x, d width C, e inner width, n state, r rank of dt, k = 4 directions.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from ssmzoo.layers.image.backbone import recomputed
from ssmzoo.layers.image.drop_path import DropPath, drop_path_rates
from ssmzoo.layers.image.restoration import RestorationNet, init_restoration, residual_conv
from ssmzoo.layers.image.ss2d import SS2D

CAB_PARTS = ("both", "convolution", "attention")


class ChannelAttention(nn.Module):
    """x * sigmoid(W2 ReLU(W1 avgpool(x))), x (b c y x), with c // squeeze units in between."""

    def __init__(self, channels: int, squeeze: int):
        super().__init__()
        units = channels // squeeze
        if units < 1:
            raise ValueError(
                f"embed_dim = {channels} leaves no unit in the channel attention (squeeze {squeeze}); use "
                f"at least {squeeze} channels or a smaller squeeze_factor"
            )
        self.attention = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, units, 1),
            nn.ReLU(),
            nn.Conv2d(units, channels, 1),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.attention(x)


class CAB(nn.Module):
    """Convolution and channel attention, (b c y x) to the same. `light`: depthwise convolutions, the last dilated.

    parts  "both", or for ablations "convolution", "attention" (what it leaves out takes its parameters along)
    """

    def __init__(self, channels: int, light: bool = False, squeeze_factor: int = 30, parts: str = "both"):
        super().__init__()
        c, third, half = channels, channels // 3, channels // 2
        if parts == "attention":
            convs = []
        elif light:
            convs = [
                nn.Conv2d(c, half, 1),
                nn.Conv2d(half, half, 3, padding=1, groups=half),
                nn.GELU(),
                nn.Conv2d(half, c, 1),
                nn.Conv2d(c, c, 3, padding=2, dilation=2, groups=c),
            ]
        else:
            convs = [nn.Conv2d(c, third, 3, padding=1), nn.GELU(), nn.Conv2d(third, c, 3, padding=1)]
        attention = [] if parts == "convolution" else [ChannelAttention(c, squeeze_factor)]
        self.cab = nn.Sequential(*convs, *attention)

    def forward(self, x: Tensor) -> Tensor:
        return self.cab(x)


class RSSB(nn.Module):
    """Residual state-space block on a map (b y x d); parameter names of the released `VSSBlock`."""

    def __init__(
        self,
        dim: int,
        d_state: int,
        expand: float,
        drop_path: float = 0.0,
        light: bool = False,
        squeeze_factor: int = 30,
        cab: str = "both",
    ):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.self_attention = SS2D(dim, d_state, ssm_ratio=expand)
        self.conv_blk = CAB(dim, light, squeeze_factor, cab)
        self.skip_scale, self.skip_scale2 = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.ones(dim))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        z = x * self.skip_scale + self.drop_path(self.self_attention(self.ln_1(x)))
        local = self.conv_blk(self.ln_2(z).permute(0, 3, 1, 2))
        return z * self.skip_scale2 + local.permute(0, 2, 3, 1)


class ResidualGroup(nn.Module):
    """T + conv(blocks(T)) on a map (b y x d). The list of blocks sits one level down, as in the released weights."""

    def __init__(self, blocks: list[RSSB], dim: int, resi_connection: str):
        super().__init__()
        self.residual_group = nn.ModuleDict({"blocks": nn.ModuleList(blocks)})
        self.conv = residual_conv(dim, resi_connection)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for block in self.residual_group["blocks"]:
            y = block(y)
        return x + self.conv(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class MambaIR(RestorationNet):
    """Images (b c y x) in [0, 1] to restored images (b c s*y s*x). The defaults are the classic model's body.

    upscale, upsampler   scale s and reconstruction head, see `RestorationNet`
    in_chans             3 (colour) or 1 (grey)
    embed_dim, depths    width C (at least squeeze_factor) and blocks per residual group
    d_state, mlp_ratio   state size and expansion of the scan
    drop_path_rate       stochastic depth of the last block, growing linearly from 0
    squeeze_factor       of the channel attention; 30 in every published model
    cab                  parts of the second branch: "both" (published), "convolution" or "attention" alone
    bicubic_skip         see `RestorationNet`
    """

    def __init__(
        self,
        upscale: int = 2,
        upsampler: str = "auto",
        in_chans: int = 3,
        embed_dim: int = 180,
        depths: tuple[int, ...] = (6, 6, 6, 6, 6, 6),
        d_state: int = 16,
        mlp_ratio: float = 2.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        patch_norm: bool = True,
        img_range: float = 1.0,
        resi_connection: str = "1conv",
        squeeze_factor: int = 30,
        cab: str = "both",
        bicubic_skip: bool = False,
    ):
        if cab not in CAB_PARTS:
            raise ValueError(f"cab is {cab!r}; expected one of {', '.join(CAB_PARTS)}")
        if upsampler == "nearest+conv":
            raise ValueError("upsampler is 'nearest+conv', which MambaIR lacks; use 'pixelshuffle' or MambaIRv2")
        super().__init__(upscale, in_chans, embed_dim, img_range, upsampler, resi_connection, bicubic_skip)
        light = self.upsampler == "pixelshuffledirect"
        rates = iter(drop_path_rates(drop_path_rate, sum(depths)))
        self.patch_embed = nn.ModuleDict({"norm": nn.LayerNorm(embed_dim)} if patch_norm else {})
        self.pos_drop = nn.Dropout(drop_rate)
        block = functools.partial(
            RSSB, embed_dim, d_state, mlp_ratio, light=light, squeeze_factor=squeeze_factor, cab=cab
        )
        self.layers = nn.ModuleList(
            ResidualGroup([block(drop_path=next(rates)) for _ in range(depth)], embed_dim, resi_connection)
            for depth in depths
        )
        self.norm = nn.LayerNorm(embed_dim)
        self.apply(init_restoration)

    def forward(self, x: Tensor) -> Tensor:
        return self.reconstruct(self.forward_features(x), x)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (b c y x) -> deep features in front of the head (b d y x)"""
        shallow = self.conv_first(self.normalise(x))  # (b d y x)
        x = shallow.permute(0, 2, 3, 1)  # (b y x d)
        if "norm" in self.patch_embed:
            x = self.patch_embed["norm"](x)
        x = self.pos_drop(x)
        for group in self.layers:
            x = recomputed(self.grad_checkpointing, group, x)
        x = self.norm(x).permute(0, 3, 1, 2).contiguous()
        return self.conv_after_body(x) + shallow
