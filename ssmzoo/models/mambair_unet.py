"""MambaIRUNet: the U-shaped MambaIR for real camera noise.

Restormer's frame (four levels, widths C, 2C, 4C, 8C, pixel-unshuffle down, pixel-shuffle up, refinement at 2C) around
the residual state-space blocks of `mambair.py`. No image mean, no global norm; the output is added to the input.
Height and width must be multiples of 8: `ssmzoo restore` pads by reflection, as the published validation does.
Source: arXiv 2402.15648; released code MambaIR@33d7b34, realDenoising (Apache-2.0), written anew here.

Letters: b batch, c image channels, y x rows and columns, d = dim.
"""

from __future__ import annotations

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from ssmzoo.models.mambair import RSSB


class Resample(nn.Module):
    """A 3x3 convolution without bias, then PixelUnshuffle (`down`: n to 2n channels) or PixelShuffle (n to n / 2)."""

    def __init__(self, channels: int, down: bool):
        super().__init__()
        conv = nn.Conv2d(channels, channels // 2 if down else 2 * channels, 3, padding=1, bias=False)
        self.body = nn.Sequential(conv, nn.PixelUnshuffle(2) if down else nn.PixelShuffle(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Blocks(nn.ModuleList):
    """(b d y x) through blocks that work channels last, and back; `recompute` keeps no activations inside a block."""

    recompute = False

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        for block in self:
            recompute = self.recompute and torch.is_grad_enabled()
            x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False) if recompute else block(x)
        return x.permute(0, 3, 1, 2)


class MambaIRUNet(nn.Module):
    """Noisy images (b c y x) in [0, 1] to clean ones of the same size. The defaults are the published model.

    inp_channels, out_channels  must be equal, or one of them 1: the output is added to the input
    dim, num_blocks             width of level 1, blocks on the four levels
    num_refinement_blocks       blocks after the last decoder level
    mlp_ratio                   expansion of the scan
    d_state                     one state size for all levels, or four
    drop_path_rate              stochastic depth, the same in every block
    bias                        of the 1x1 reductions and the output convolution
    squeeze_factor              of the channel attention; dim must be at least this
    """

    size_multiple = 8  # what height and width must be divisible by
    upscale = 1

    def __init__(
        self,
        inp_channels: int = 3,
        out_channels: int = 3,
        dim: int = 48,
        num_blocks: tuple[int, ...] = (4, 6, 6, 8),
        num_refinement_blocks: int = 4,
        mlp_ratio: float = 1.5,
        d_state: int | tuple[int, ...] = 16,
        drop_path_rate: float = 0.0,
        bias: bool = False,
        squeeze_factor: int = 30,
    ):
        super().__init__()
        if len(num_blocks) != 4:
            raise ValueError(f"num_blocks has {len(num_blocks)} entries; the U has 4 levels")
        if out_channels not in (inp_channels, 1) and inp_channels != 1:
            raise ValueError(
                f"inp_channels = {inp_channels} and out_channels = {out_channels}: the input is added to "
                f"the output, so they must agree"
            )
        self.in_chans = inp_channels
        states = (d_state,) * 4 if isinstance(d_state, int) else tuple(d_state)

        def stack(n: int, width: int, level: int) -> Blocks:
            return Blocks(
                RSSB(width, states[level], mlp_ratio, drop_path_rate, squeeze_factor=squeeze_factor) for _ in range(n)
            )

        n1, n2, n3, n4 = num_blocks
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(inp_channels, dim, 3, padding=1, bias=False)})
        self.encoder_level1 = stack(n1, dim, 0)
        self.down1_2, self.encoder_level2 = Resample(dim, down=True), stack(n2, 2 * dim, 1)
        self.down2_3, self.encoder_level3 = Resample(2 * dim, down=True), stack(n3, 4 * dim, 2)
        self.down3_4, self.latent = Resample(4 * dim, down=True), stack(n4, 8 * dim, 3)
        self.up4_3, self.up3_2, self.up2_1 = (Resample(f * dim, down=False) for f in (8, 4, 2))
        self.reduce_chan_level3 = nn.Conv2d(8 * dim, 4 * dim, 1, bias=bias)
        self.reduce_chan_level2 = nn.Conv2d(4 * dim, 2 * dim, 1, bias=bias)
        self.decoder_level3, self.decoder_level2 = stack(n3, 4 * dim, 2), stack(n2, 2 * dim, 1)
        self.decoder_level1, self.refinement = stack(n1, 2 * dim, 1), stack(num_refinement_blocks, 2 * dim, 1)
        self.output = nn.Conv2d(2 * dim, out_channels, 3, padding=1, bias=bias)
        for linear in self.modules():  # the released U-Net keeps PyTorch's initial values
            if isinstance(linear, nn.Linear):
                linear.reset_parameters()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute every block in the backward pass instead of keeping its activations."""
        for blocks in (m for m in self.modules() if isinstance(m, Blocks)):
            blocks.recompute = enable

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.in_chans:
            raise ValueError(f"the input has shape {tuple(x.shape)}; expected (batch, {self.in_chans}, height, width)")
        if x.shape[2] % self.size_multiple or x.shape[3] % self.size_multiple:
            raise ValueError(
                f"the image is {x.shape[2]} x {x.shape[3]}; MambaIRUNet needs multiples of 8 (pad by "
                f"reflection and crop the result)"
            )
        level1 = self.encoder_level1(self.patch_embed["proj"](x))
        level2 = self.encoder_level2(self.down1_2(level1))
        level3 = self.encoder_level3(self.down2_3(level2))
        latent = self.latent(self.down3_4(level3))
        y = self.reduce_chan_level3(torch.cat([self.up4_3(latent), level3], 1))
        y = self.decoder_level3(y)
        y = self.reduce_chan_level2(torch.cat([self.up3_2(y), level2], 1))
        y = self.decoder_level2(y)
        y = self.decoder_level1(torch.cat([self.up2_1(y), level1], 1))  # 2d channels, no reduction
        return self.output(self.refinement(y)) + x
