"""EDSR: restoration by plain convolutions, the control in MambaIR's frame that sees only what lies near.

    X <- X + conv3x3(ReLU(conv3x3(X)))

Blocks without norms, then one convolution, on a residual stream; shallow convolution, head and image mean
are those of `RestorationNet`, as in MambaIR and SwinIR.
Source: Lim et al. 2017, EDSR (arXiv 1707.02921). Own parameter names: released weights are not read.

Letters: b batch, y x rows and columns, d width.
"""

from __future__ import annotations

from torch import Tensor, nn

from ssmzoo.layers.image.backbone import recomputed
from ssmzoo.layers.image.restoration import RestorationNet


class ConvBlock(nn.Module):
    """(b d y x) -> (b d y x)"""

    def __init__(self, dim: int, res_scale: float):
        super().__init__()
        self.res_scale = res_scale
        self.conv1, self.conv2 = (nn.Conv2d(dim, dim, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.res_scale * self.conv2(self.conv1(x).relu())


class EDSR(RestorationNet):
    """Images (b c y x) in [0, 1] to restored images (b c s*y s*x), any size. The defaults are the paper's baseline.

    upscale, upsampler  scale s and reconstruction head, see `RestorationNet`
    embed_dim, depth    width and number of blocks | res_scale  of what a block adds (0.1 in wide networks)
    bicubic_skip        see `RestorationNet`
    """

    def __init__(
        self,
        upscale: int = 2,
        upsampler: str = "auto",
        in_chans: int = 3,
        embed_dim: int = 64,
        depth: int = 16,
        res_scale: float = 1.0,
        img_range: float = 1.0,
        bicubic_skip: bool = False,
    ):
        super().__init__(upscale, in_chans, embed_dim, img_range, upsampler, "1conv", bicubic_skip)
        self.layers = nn.ModuleList(ConvBlock(embed_dim, res_scale) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        return self.reconstruct(self.forward_features(x), x)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (b c y x) -> deep features in front of the head (b d y x)"""
        shallow = x = self.conv_first(self.normalise(x))  # (b d y x)
        for block in self.layers:
            x = recomputed(self.grad_checkpointing, block, x)
        return self.conv_after_body(x) + shallow
