"""Plain (one-resolution) image encoders: patches in raster order, class or register tokens among them, positions.

    layout      tokens                     place in a sequence of m patches
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
from ssmzoo.layers.image.patch_embed import PatchEmbed, resize_map

LAYOUTS = {"none": 0, "head": 1, "middle": 1, "tail": 1, "double": 2}


def token_places(layout: str, m: int, t: int) -> tuple[int, ...]:
    """Where the t tokens of a layout stand among m patches, ascending."""
    if layout == "spread":
        group = m // (t + 1)
        return tuple(group + i * (group + 1) for i in range(t))
    places = {"none": (), "head": (0,), "middle": (m // 2,), "tail": (m,), "double": (0, m + 1)}
    if layout not in places:
        raise ValueError(f"unknown token layout {layout!r}; expected one of {', '.join([*places, 'spread'])}")
    return places[layout]


def insert_tokens(patches: Tensor, tokens: Tensor, places: Sequence[int]) -> Tensor:
    """patches (b m d), tokens (1 or b, t, d) -> (b m+t d)"""
    tokens = tokens.to(patches.dtype).expand(len(patches), -1, -1)
    pieces, done = [], 0
    for i, place in enumerate(places):
        pieces += [patches[:, done : place - i], tokens[:, i : i + 1]]
        done = place - i
    return torch.cat([*pieces, patches[:, done:]], dim=1)


def split_tokens(x: Tensor, places: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(b l d) -> patches (b m d), tokens (b t d)"""
    edges = [-1, *places, x.shape[1]]
    patches = torch.cat([x[:, a + 1 : b] for a, b in zip(edges, edges[1:])], dim=1)
    return patches, torch.cat([x[:, p : p + 1] for p in places], dim=1) if places else x[:, :0]


def lecun_normal_(conv: nn.Conv2d) -> None:
    """Truncated normal with variance 1 / fan_in, bias 0."""
    fan_in = conv.weight[0].numel()
    std = fan_in**-0.5 / 0.87962566103423978  # the deviation of a normal cut at two deviations
    nn.init.trunc_normal_(conv.weight, std=std, a=-2 * std, b=2 * std)
    nn.init.zeros_(conv.bias)


class PlainBackbone(ImageBackbone):
    """Patches and tokens through `encode`, a final norm, and a head on tokens or patches.

    Subclasses call `init_tokens`, build `layers` and `norm_f`, call `init_head`, and define
    `encode(x (b l d), taps) -> (b l d)`, which appends (residual stream, branch output) per block to `taps`.

    global_pool  "token" (mean of the class tokens), "avg" (mean of the patches), "last" (the last token),
                 "max_logits" (largest logit over all tokens), "all" (a prediction per token), "" (the tokens)
    """

    POOLS = ("token", "avg", "last", "max_logits", "all", "")

    def init_tokens(
        self,
        img_size: int | Sequence[int],
        patch_size: int,
        stride: int | None,
        in_chans: int,
        embed_dim: int,
        layout: str,
        n_tokens: int | None = None,
    ) -> None:
        self.img_size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        self.embed_dim, self.layout = embed_dim, layout
        self.n_tokens = LAYOUTS.get(layout, 0) if n_tokens is None else n_tokens
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim, stride)
        self.grid = self.patch_embed.grid(*self.img_size)
        if min(self.grid) < 1:
            raise ValueError(f"img_size={self.img_size} is smaller than one patch of {patch_size} pixels")
        token_places(layout, self.grid[0] * self.grid[1], self.n_tokens)
        self.num_prefix_tokens = self.n_tokens  # timm's name; here they may stand anywhere

    def init_stream(self, depth: int) -> None:
        reduction = self.patch_embed.stride
        self.feature_info = [
            dict(num_chs=self.embed_dim, reduction=reduction, module=f"layers.{i}") for i in range(depth)
        ]

    def places(self, l: int) -> tuple[int, ...]:
        return token_places(self.layout, l - self.n_tokens, self.n_tokens)

    def positions(self, table: Tensor, grid: tuple[int, int], built: tuple[int, int] | None = None) -> Tensor:
        """A position table (1 m+t d) with rows for the tokens at their places, resized bicubically to another grid."""
        built = built or self.grid
        if tuple(grid) == built:
            return table
        tokens = table.shape[1] - built[0] * built[1]  # 0 where the tokens have a table of their own
        layout = self.layout if tokens else "none"
        patches, rows = split_tokens(table, token_places(layout, built[0] * built[1], tokens))
        patches = resize_map(patches.unflatten(1, built), grid).flatten(1, 2)
        return insert_tokens(patches, rows, token_places(layout, patches.shape[1], tokens))

    def embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Image (b c y x) -> sequence (b l d) with tokens and positions, and the grid of its patches."""
        x = self.patch_embed(x)
        grid, x = tuple(x.shape[1:3]), x.flatten(1, 2)
        if self.n_tokens:
            x = insert_tokens(x, self.class_tokens(), token_places(self.layout, x.shape[1], self.n_tokens))
        return (x if self.pos_embed is None else x + self.positions(self.pos_embed, grid)), grid

    def class_tokens(self) -> Tensor:
        """(1 t d)"""
        return self.cls_token

    def forward_features(self, x: Tensor) -> Tensor:
        x, grid = self.embed(x)
        return self.norm_f(self.encode(self.pos_drop(x), grid))

    def pool(self, x: Tensor) -> Tensor:
        if self.global_pool == "token":
            return split_tokens(x, self.places(x.shape[1]))[1].mean(1)
        if self.global_pool == "avg":
            return split_tokens(x, self.places(x.shape[1]))[0].mean(1)
        return x[:, -1] if self.global_pool == "last" else x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = super().forward_head(x, pre_logits)
        return x.amax(1) if self.global_pool == "max_logits" and not pre_logits else x

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
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
        taken, taps = take_indices(len(self.feature_info), indices), []
        x, grid = self.embed(x)
        x = self.encode(self.pos_drop(x), grid, taps, stop=max(taken) if stop_early else None)
        final, out = self.norm_f(x), []
        for i in taken:
            value = taps[i][tap == "branch"]
            patches, tokens = split_tokens(self.norm_f(value) if norm else value, self.places(value.shape[1]))
            patches = patches.unflatten(1, grid).permute(0, 3, 1, 2) if output_fmt == "NCHW" else patches
            out.append((patches, tokens) if return_prefix_tokens else patches)
        return out if intermediates_only else (final, out)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] | None = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what no tap needs; the indices that remain are returned."""
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
