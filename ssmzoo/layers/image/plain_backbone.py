"""Plain (one-resolution) image encoders: patches in raster order, class or register tokens among them, positions.

    layout      tokens                     index in a sequence of m patches
    "none"      -
    "head"      one class token            0
    "middle"    one class token            m // 2
    "tail"      one class token            m
    "double"    two class tokens           0 and m + 1
    "spread"    k registers                behind every group of m // (k + 1) patches; the rest comes last

b batch, m patches, t tokens, l = m + t, d width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ssmzoo.layers.image.backbone import ImageBackbone, take_indices
from ssmzoo.layers.image.patch_embed import PatchEmbed, height_width, resize_map

LAYOUTS = {"none": 0, "head": 1, "middle": 1, "tail": 1, "double": 2}


def token_indices(layout: str, m: int, t: int) -> tuple[int, ...]:
    """Indices of the t tokens of a layout in a sequence of m patches and t tokens, ascending."""
    if layout == "spread":
        group = m // (t + 1)
        return tuple(group + i * (group + 1) for i in range(t))
    indices = {"none": (), "head": (0,), "middle": (m // 2,), "tail": (m,), "double": (0, m + 1)}
    if layout not in indices:
        raise ValueError(f"unknown token layout {layout!r}; expected one of {', '.join([*indices, 'spread'])}")
    return indices[layout]


def insert_tokens(patches: Tensor, tokens: Tensor, indices: Sequence[int]) -> Tensor:
    """patches (b m d), tokens (1 or b, t, d) -> (b m+t d)"""
    tokens = tokens.to(patches.dtype).expand(patches.shape[0], -1, -1)
    pieces, done = [], 0
    for i, index in enumerate(indices):
        pieces += [patches[:, done : index - i], tokens[:, i : i + 1]]
        done = index - i
    return torch.cat([*pieces, patches[:, done:]], dim=1)


def split_tokens(x: Tensor, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(b l d) -> patches (b m d), tokens (b t d)"""
    edges = [-1, *indices, x.shape[1]]
    patches = torch.cat([x[:, a + 1 : b] for a, b in zip(edges, edges[1:])], dim=1)
    return patches, torch.cat([x[:, i : i + 1] for i in indices], dim=1) if indices else x[:, :0]


def lecun_normal_(conv: nn.Conv2d) -> None:
    """Truncated normal with variance 1 / fan_in, bias 0."""
    fan_in = conv.weight[0].numel()
    std = fan_in**-0.5 / 0.87962566103423978  # the deviation of a normal cut at two deviations
    nn.init.trunc_normal_(conv.weight, std=std, a=-2 * std, b=2 * std)
    nn.init.zeros_(conv.bias)


def patch_grid(patch_embed: PatchEmbed, img_size: int | Sequence[int]) -> tuple[int, int]:
    """Rows and columns of patches of an image of img_size. Raises ValueError if not one fits in."""
    height, width = height_width(img_size)
    grid = patch_embed.grid(height, width)
    if min(grid) < 1:
        raise ValueError(f"img_size=({height}, {width}) is smaller than one patch of {patch_embed.patch_size} pixels")
    return grid


class PlainBackbone(ImageBackbone):
    """Patches and tokens through equal blocks, a final norm, and a head on tokens or patches.

    A subclass sets `patch_embed`, `grid` (of the built size), `embed_dim`, `layout` and `n_tokens`, `pos_embed` (table
    or None), `layers`, `norm_f` and `feature_info` (`block_info`), and defines
        embed(x (b c y x)) -> (tokens (b l d) with positions, grid of the patches)
        forward_blocks(x (b l d), grid, seen=None, stop=None) -> (b l d)
    the latter up to block `stop`, if given; (residual stream, what the block added) of every block go into `seen`.

    global_pool  "token" (mean of the class tokens), "avg" (mean of the patches), "last" (the last token),
                 "max_logits" (largest logit over all tokens), "all" (a prediction per token), "" (the tokens)
    """

    POOLS = ("token", "avg", "last", "max_logits", "all", "")

    @property
    def num_prefix_tokens(self) -> int:
        """timm's name for the number of class tokens; here they may stand anywhere."""
        return self.n_tokens

    def token_indices(self, l: int) -> tuple[int, ...]:
        """Indices of the class tokens in a sequence of l patches and tokens."""
        return token_indices(self.layout, l - self.n_tokens, self.n_tokens)

    def positions(self, table: Tensor, grid: tuple[int, int], built: tuple[int, int] | None = None) -> Tensor:
        """A position table (1 m+t d) with rows for the tokens at their indices, resized bicubically to another grid."""
        built = built or self.grid
        if tuple(grid) == built:
            return table
        tokens = table.shape[1] - built[0] * built[1]  # 0 where the tokens have a table of their own
        layout = self.layout if tokens else "none"
        patches, rows = split_tokens(table, token_indices(layout, built[0] * built[1], tokens))
        patches = resize_map(patches.unflatten(1, built), grid).flatten(1, 2)
        return insert_tokens(patches, rows, token_indices(layout, patches.shape[1], tokens))

    def pool_tokens(self, x: Tensor) -> Tensor:
        """(b l d) -> (b d), or as it is where global_pool leaves the tokens to the head."""
        if self.global_pool == "token":
            return split_tokens(x, self.token_indices(x.shape[1]))[1].mean(1)
        if self.global_pool == "avg":
            return split_tokens(x, self.token_indices(x.shape[1]))[0].mean(1)
        return x[:, -1] if self.global_pool == "last" else x

    def classify(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """What `pool_tokens` left of the tokens through dropout and head; for "max_logits" the maximum over them."""
        x = self.head_drop(x)
        if pre_logits:
            return x
        return self.head(x).amax(1) if self.global_pool == "max_logits" else self.head(x)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """See `ImageBackbone`."""
        if (self.global_pool if global_pool is None else global_pool) == "token" and not self.n_tokens:
            raise ValueError("global_pool='token' needs a class token; take 'avg', or another token layout")
        super().reset_classifier(num_classes, global_pool)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        tap: str = "stream",
    ):
        """Patches of the residual stream behind the blocks asked for, as maps; the final features in front of them.

        tap   "stream" or "branch": the residual stream, or what the block adds to it (as the dense heads of Vim's and
              ShuffleMamba's authors take it)
        norm  apply the final norm to every map | output_fmt  "NCHW" maps or "NLC" sequences of patches
        return_prefix_tokens  also the class tokens (b t d): a list of (map, tokens)
        """
        if output_fmt not in ("NCHW", "NLC") or tap not in ("stream", "branch"):
            raise ValueError(
                f"output_fmt must be 'NCHW' or 'NLC' and tap 'stream' or 'branch', got {output_fmt!r} and {tap!r}"
            )
        taken, seen = take_indices(len(self.feature_info), indices), []
        x, grid = self.embed(x)
        final, out = self.norm_f(self.forward_blocks(x, grid, seen, stop=max(taken) if stop_early else None)), []
        for i in taken:
            value = seen[i][tap == "branch"]
            value = self.norm_f(value) if norm else value
            patches, tokens = split_tokens(value, self.token_indices(value.shape[1]))
            patches = patches.unflatten(1, grid).permute(0, 3, 1, 2) if output_fmt == "NCHW" else patches
            out.append((patches, tokens) if return_prefix_tokens else patches)
        return out if intermediates_only else (final, out)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] | None = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what no feature asked for needs; the indices that remain are returned."""
        taken = take_indices(len(self.feature_info), indices)
        self.layers = self.layers[: max(taken) + 1]
        if prune_norm:
            self.norm_f = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return taken

    def group_matcher(self, coarse: bool = False) -> dict:
        """Layer decay: the stem, then every block in order."""
        return dict(
            stem=r"^(?:cls_token|pos_embed|patch_embed)",
            blocks=[(r"^layers\.(\d+)", None), (r"^(?:norm_f|neck|norm_neck)", (99999,))],
        )


def block_info(depth: int, embed_dim: int, reduction: int) -> list[dict]:
    """timm's `feature_info` of `depth` blocks on maps of 1 / reduction of the image."""
    return [dict(num_chs=embed_dim, reduction=reduction, module=f"layers.{i}") for i in range(depth)]
