"""Adventurer: a plain image encoder with a causal, one-direction Mamba-2 mixer, down to tokens of one pixel.

    X = [patches, class token] + positions
    u = norm(X), in blocks chosen by `flip_rule` with the patches reversed (the class token stays last)
    w = Mamba2([mean(u), u]) without its first token, patches back in order
    X <- X + DropPath(w);      X <- X + DropPath(SwiGLU(norm_mlp(X)))          logits = W norm_f(X)[last]

Two tricks give early tokens a view of the whole: the mean of all tokens in front of the sequence, in every block, and
the flips. The paper flips "between every two layers"; the released code flips blocks 2 and 3 only (n // 2 == 1), and
its checkpoints are evaluated so: `flip_rule` is "every_two" (n // 2 odd), "every_other" (n odd) or "released". Other
image sizes resize the positions with the class row last (the released loaders take the first row for it).

b batch, m patches, l = m + 1 tokens, d width.
Source: Wang et al. 2024 (arXiv 2410.07599, CVPR 2025) and 2025 (arXiv 2502.03738, patch scaling); the public projects
Adventurer and Patch_Scaling carry no licence and are written anew here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ssmzoo.layers.image.backbone import recomputed
from ssmzoo.layers.image.drop_path import DropPath, drop_path_rates
from ssmzoo.layers.image.mlp import SwiGLU
from ssmzoo.layers.image.patch_embed import PatchEmbed
from ssmzoo.layers.image.plain_backbone import PlainBackbone, block_info, insert_tokens, patch_grid
from ssmzoo.layers.mixers.mamba2 import Mamba2
from ssmzoo.layers.norm import RMSNorm
from ssmzoo.models.vim import init_plain_
from ssmzoo.ops import permute_tokens, prepend_mean
from ssmzoo.suggest import from_slot

FLIP_RULES = {
    "every_two": lambda n: n // 2 % 2 == 1,
    "every_other": lambda n: n % 2 == 1,
    "released": lambda n: n // 2 == 1,
    "never": lambda n: False,
}


class AdventurerBlock(nn.Module):
    """Mixer and MLP on (b l d); `flip` reverses the patches for the mixer."""

    def __init__(
        self,
        dim: int,
        d_state: int,
        expand: float,
        mlp_ratio: float = 2.5,
        drop_path: float = 0.0,
        flip: bool = False,
        mixer: dict | None = None,
    ):
        super().__init__()
        self.norm, self.norm_mlp = RMSNorm(dim), RMSNorm(dim)
        self.mixer = from_slot("mixer", mixer, Mamba2, dim, d_state, expand=expand)
        self.mlp = SwiGLU(dim, int(mlp_ratio * dim))
        self.drop_path, self.flip = DropPath(drop_path), flip

    def forward(self, x: Tensor) -> Tensor:
        w, _ = self.mixer(prepend_mean(self.flip_patches(self.norm(x))))
        x = x + self.drop_path(self.flip_patches(w[:, 1:], back=True))
        return x + self.drop_path(self.mlp(self.norm_mlp(x)))

    def flip_patches(self, x: Tensor, back: bool = False) -> Tensor:
        """The patches reversed, in blocks that do so, and brought back; the class token stays last."""
        if not self.flip:
            return x
        steps = torch.arange(x.shape[1], device=x.device)
        return permute_tokens(x, torch.cat([steps[:-1].flip(0), steps[-1:]]), inverse=back)


class Adventurer(PlainBackbone):
    """Image classifier. (b c y x) -> (b num_classes); the defaults are Adventurer-Tiny/16.

    img_size, patch_size  built size, one number or (height, width), and the side of a patch, from 1 on
    d_state, expand       of the Mamba-2 mixer; `mixer` holds its further arguments
    mlp_ratio             hidden width of the SwiGLU relative to d
    flip_rule             "every_two", "every_other", "released" or "never", see above
    drop_path_rate        the released schedule starts with two zeros and ends one step below the rate
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        img_size: int | Sequence[int] = 224,
        patch_size: int = 16,
        embed_dim: int = 256,
        depth: int = 12,
        d_state: int = 64,
        expand: float = 2,
        mixer: dict | None = None,
        mlp_ratio: float = 2.5,
        flip_rule: str = "every_two",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        if flip_rule not in FLIP_RULES:
            raise ValueError(f"flip_rule is {flip_rule!r}; expected one of {', '.join(FLIP_RULES)}")
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.grid, self.embed_dim = patch_grid(self.patch_embed, img_size), embed_dim
        self.layout, self.n_tokens = "tail", 1
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.grid[0] * self.grid[1] + 1, embed_dim))
        self.pos_drop = nn.Dropout(drop_rate)
        rates = [0.0, *drop_path_rates(drop_path_rate, depth)]
        flips = FLIP_RULES[flip_rule]
        self.layers = nn.ModuleList(
            AdventurerBlock(embed_dim, d_state, expand, mlp_ratio, rates[n], flips(n), mixer) for n in range(depth)
        )
        self.norm_f = RMSNorm(embed_dim)
        self.num_features, self.head_drop = embed_dim, nn.Dropout(0.0)
        self.feature_info = block_info(depth, embed_dim, patch_size)
        self.reset_classifier(num_classes, global_pool)
        init_plain_(self)
        for layer in self.layers:
            for linear in (layer.mlp.w1, layer.mlp.w2, layer.mlp.w3):
                nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (b c y x) -> normed tokens (b l d), the class token last"""
        return self.norm_f(self.forward_blocks(*self.embed(x)))

    def embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Images (b c y x) -> tokens with positions (b l d), and the grid of the patches."""
        x = self.patch_embed(x)
        grid, x = tuple(x.shape[1:3]), x.flatten(1, 2)  # (b m d)
        x = insert_tokens(x, self.cls_token, (x.shape[1],))  # (b l d)
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
