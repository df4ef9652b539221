"""SwinIR: restoration by shifted-window attention, whose frame MambaIR keeps and which it is measured against.

Groups of Swin blocks, each group ending in a convolution, on a residual stream that is a map of tokens:

    X <- X + WindowAttention(LN1 X)             X <- X + MLP(LN2 X)

Every second block shifts its windows by half their side. Pictures are mirrored up to a multiple of the window. Shallow
convolution, reconstruction head and image mean are those of `RestorationNet`, as in MambaIR.
Source: Liang et al., SwinIR, arXiv 2108.10257. Own parameter names: released weights are not read.

Letters: b batch, y x rows and columns, d width.
"""

from __future__ import annotations

from torch import Tensor, nn

from ssmzoo.layers.image.backbone import recomputed
from ssmzoo.layers.image.drop_path import DropPath, drop_path_rates
from ssmzoo.layers.image.restoration import RestorationNet, init_restoration, residual_conv
from ssmzoo.layers.image.window_attention import WindowAttention, shifted_window_attention


class SwinBlock(nn.Module):
    """Window attention and an MLP, pre-norm; (b y x d) with y and x multiples of the window."""

    def __init__(self, dim: int, num_heads: int, window_size: int, shift: int, mlp_ratio: float, drop_path: float):
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.shift = shift
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.attn = nn.Linear(dim, 3 * dim), WindowAttention(dim, window_size, num_heads)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(shifted_window_attention(self.qkv(self.norm1(x)), self.attn, self.shift))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class SwinGroup(nn.Module):
    """x + conv(blocks(x)) on a map (b y x d)."""

    def __init__(self, blocks: list[SwinBlock], dim: int, resi_connection: str):
        super().__init__()
        self.blocks, self.conv = nn.Sequential(*blocks), residual_conv(dim, resi_connection)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(self.blocks(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class SwinIR(RestorationNet):
    """Images (b c y x) in [0, 1] to restored images (b c s*y s*x), any size. The defaults are the light model.

    upscale, upsampler  scale s and reconstruction head, see `RestorationNet`
    embed_dim, depths   width and blocks per residual group
    num_heads           attention heads; window_size  side of a window in pixels
    mlp_ratio           hidden width of the MLP over embed_dim
    drop_path_rate      stochastic depth of the last block, growing linearly from 0
    bicubic_skip        see `RestorationNet`
    """

    def __init__(
        self,
        upscale: int = 2,
        upsampler: str = "auto",
        in_chans: int = 3,
        embed_dim: int = 60,
        depths: tuple[int, ...] = (6, 6, 6, 6),
        num_heads: int = 6,
        window_size: int = 8,
        mlp_ratio: float = 2.0,
        drop_path_rate: float = 0.1,
        img_range: float = 1.0,
        resi_connection: str = "1conv",
        bicubic_skip: bool = False,
    ):
        super().__init__(upscale, in_chans, embed_dim, img_range, upsampler, resi_connection, bicubic_skip)
        self.window_size = window_size
        rates = iter(drop_path_rates(drop_path_rate, sum(depths)))

        def block(i: int) -> SwinBlock:
            shift = 0 if i % 2 == 0 else window_size // 2
            return SwinBlock(embed_dim, num_heads, window_size, shift, mlp_ratio, next(rates))

        self.embed_norm, self.norm = nn.LayerNorm(embed_dim), nn.LayerNorm(embed_dim)
        self.layers = nn.ModuleList(SwinGroup([block(i) for i in range(n)], embed_dim, resi_connection) for n in depths)
        self.apply(init_restoration)

    def forward(self, x: Tensor) -> Tensor:
        return self.reconstruct(self.forward_features(x), x)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (b c y x) -> deep features in front of the head (b d y x), y and x in multiples of the window"""
        shallow = self.conv_first(self.normalise(x))  # (b d y x)
        x = self.embed_norm(shallow.permute(0, 2, 3, 1))  # (b y x d)
        for group in self.layers:
            x = recomputed(self.grad_checkpointing, group, x)
        return self.conv_after_body(self.norm(x).permute(0, 3, 1, 2)) + shallow
