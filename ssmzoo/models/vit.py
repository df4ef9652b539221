"""A plain vision transformer: what the plain state-space encoders are compared with, at equal width and depth.

    X = [class token, patches] + positions
    X <- X + DropPath(Attention(LN X));      X <- X + DropPath(MLP(LN X))            logits = W LN(X)[class token]

Parameter names are timm's, but for `layers` (timm: blocks) and `norm_f` (norm).

b batch, m patches, l = m + 1 tokens, d width, h heads.
Source: Dosovitskiy et al. 2020 (arXiv 2010.11929); Touvron et al. 2020 (DeiT, arXiv 2012.12877) for its sizes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ssmzoo.layers.image.backbone import recomputed
from ssmzoo.layers.image.drop_path import DropPath, drop_path_rates
from ssmzoo.layers.image.mlp import Mlp
from ssmzoo.layers.image.patch_embed import PatchEmbed
from ssmzoo.layers.image.plain_backbone import PlainBackbone, block_info, insert_tokens, lecun_normal_, patch_grid
from ssmzoo.models.vmamba import init_linear
from ssmzoo.ops.transforms import scaled_dot_product_attention


class Attention(nn.Module):
    """Every token sees every other: (b l d) -> (b l d)"""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"embed_dim={dim} has no {num_heads} heads; num_heads must divide it")
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # each (b h l d/h)
        return self.proj(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class ViTBlock(nn.Module):
    """(b l d) -> (b l d)"""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, drop_path: float = 0.0):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim, eps=1e-6), Attention(dim, num_heads)
        self.norm2, self.mlp = nn.LayerNorm(dim, eps=1e-6), Mlp(dim, int(mlp_ratio * dim))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class ViT(PlainBackbone):
    """Image classifier. (b c y x) -> (b num_classes); the defaults are DeiT-Ti/16.

    img_size, patch_size  built size, one number or (height, width), and the side of a patch, from 1 on
    mlp_ratio             hidden width of the MLPs relative to d
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        img_size: int | Sequence[int] = 224,
        patch_size: int = 16,
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.grid, self.embed_dim = patch_grid(self.patch_embed, img_size), embed_dim
        self.layout, self.n_tokens = "head", 1
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.grid[0] * self.grid[1] + 1, embed_dim))
        self.pos_drop = nn.Dropout(drop_rate)
        rates = drop_path_rates(drop_path_rate, depth)
        self.layers = nn.ModuleList(ViTBlock(embed_dim, num_heads, mlp_ratio, rate) for rate in rates)
        self.norm_f = nn.LayerNorm(embed_dim, eps=1e-6)
        self.num_features, self.head_drop = embed_dim, nn.Dropout(0.0)
        self.feature_info = block_info(depth, embed_dim, patch_size)
        self.reset_classifier(num_classes, global_pool)
        self.apply(init_linear)
        lecun_normal_(self.patch_embed.proj)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (b c y x) -> normed tokens (b l d), the class token first"""
        return self.norm_f(self.forward_blocks(*self.embed(x)))

    def embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Images (b c y x) -> tokens with positions (b l d), and the grid of the patches."""
        x = self.patch_embed(x)
        grid, x = tuple(x.shape[1:3]), x.flatten(1, 2)  # (b m d)
        x = insert_tokens(x, self.cls_token, (0,))  # (b l d)
        return self.pos_drop(x + self.positions(self.pos_embed, grid)), grid

    def forward_blocks(
        self, x: Tensor, grid: tuple[int, int], seen: list | None = None, stop: int | None = None
    ) -> Tensor:
        """Tokens (b l d) through the blocks up to `stop`; (stream, what was added) of every block go into `seen`."""
        for i, layer in enumerate(self.layers):
            before, x = x, recomputed(self.grad_checkpointing and self.training, layer, x)
            if seen is not None:
                seen.append((x, x - before))
            if i == stop:
                break
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return self.classify(self.pool_tokens(x), pre_logits)
