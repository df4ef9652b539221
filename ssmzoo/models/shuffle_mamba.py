"""ShuffleMamba: stochastic layer-wise shuffle, a regulariser for plain vision Mambas; nothing changes at inference.

While training, layer i of n sees its tokens in a random order with probability p_i = shuffle_rate * i / (n - 1), one
permutation for the whole batch, class and register tokens included, and its output is put back into the original order:

    X <- X + Layer(X[:, pi])[:, pi^-1]        u_i < p_i;  pi the identity otherwise

The draws of a forward pass are made before its first layer, so that checkpointing replays them and compiled graphs
stay whole. Two bodies: `ShuffleMamba` is Vim with the class token in front; `ShuffleMambaReg` (the body of Mamba-Reg)
spreads k registers over the sequence, narrows each by `neck` and classifies all of them together.

b batch, m patches, k registers, l tokens, d width, n layers.
Source: Huang et al. 2024 (arXiv 2408.17081); the public project ShuffleMamba carries no licence and is rewritten here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ssmzoo.layers.image.backbone import recomputed
from ssmzoo.layers.image.drop_path import drop_path_rates
from ssmzoo.layers.image.patch_embed import PatchEmbed
from ssmzoo.layers.image.plain_backbone import (
    PlainBackbone,
    block_info,
    insert_tokens,
    patch_grid,
    split_tokens,
    token_indices,
)
from ssmzoo.layers.init import scaled_output_
from ssmzoo.layers.norm import RMSNorm
from ssmzoo.models.vim import Vim, VimBlock, VimMixer, init_plain_
from ssmzoo.models.vmamba import init_linear
from ssmzoo.ops import permute_tokens
from ssmzoo.suggest import from_slot


def draw_permutations(layers: int, l: int, rate: float, device, u: Tensor | None = None, perm: Tensor | None = None):
    """(layers l): per layer the identity or, with its probability, a permutation; u and perm as in `ShuffleMamba`."""
    u = torch.rand(layers, device=device) if u is None else u
    perm = torch.rand(layers, l, device=device).argsort(1) if perm is None else perm.long()
    p = rate * torch.arange(layers, device=device) / max(layers - 1, 1)
    return torch.where((u < p)[:, None], perm, torch.arange(l, device=device))


def shuffled_blocks(x: Tensor, layers: nn.ModuleList, permutations: Tensor, recompute: bool) -> Tensor:
    """Tokens (b l d) through residual branches that each see them in a permutation of their own (n l)."""
    for order, layer in zip(permutations, layers):
        x = x + permute_tokens(recomputed(recompute, layer, permute_tokens(x, order)), order, inverse=True)
    return x


def check_rate(shuffle_rate: float) -> None:
    if not 0 <= shuffle_rate <= 1:
        raise ValueError(f"shuffle_rate is a probability, got {shuffle_rate}")


class LayerShuffle(PlainBackbone):
    """A plain encoder with a `shuffle_rate`: u (n) uniforms and perm (n l) permutations fix the draws of a pass."""

    def forward(self, x: Tensor, u: Tensor | None = None, perm: Tensor | None = None) -> Tensor:
        return self.forward_head(self.forward_features(x, u, perm))

    def forward_features(self, x: Tensor, u: Tensor | None = None, perm: Tensor | None = None) -> Tensor:
        """Images (b c y x) -> normed tokens (b l d)"""
        x, grid = self.embed(x)
        if not (self.training and self.shuffle_rate > 0):
            return self.norm_f(self.forward_blocks(x, grid))
        permutations = draw_permutations(len(self.layers), x.shape[1], self.shuffle_rate, x.device, u, perm)
        return self.norm_f(shuffled_blocks(x, self.layers, permutations, self.grad_checkpointing))


class ShuffleMamba(LayerShuffle, Vim):
    """Image classifier. (b c y x) -> (b num_classes); the defaults are the tiny size with the class token in front.

    shuffle_rate  the last layer's probability of a shuffle; 0 switches it off
    forward       u (n) uniforms and perm (n l) permutations may be given to fix the draws of a training pass
    Other arguments as in `Vim`.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        img_size: int | Sequence[int] = 224,
        patch_size: int = 16,
        embed_dim: int = 192,
        depth: int = 24,
        d_state: int = 16,
        class_token: str = "head",
        mixer: dict | None = None,
        norm: str = "rms",
        shuffle_rate: float = 0.5,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        stride: int | None = None,
    ):
        check_rate(shuffle_rate)
        super().__init__(
            in_chans,
            num_classes,
            global_pool,
            img_size,
            patch_size,
            stride,
            embed_dim,
            depth,
            d_state,
            class_token,
            mixer,
            norm,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
        )
        self.shuffle_rate = shuffle_rate
        self.apply(init_linear)  # truncated normal 0.02 with zero bias, also dt_proj
        nn.init.zeros_(self.cls_token)
        for layer in self.layers:
            scaled_output_(layer.mixer.out_proj.weight, depth)


class ShuffleMambaReg(LayerShuffle):
    """Image classifier on k register tokens. (b c y x) -> (b num_classes); the defaults are the base size.

    img_size, patch_size     built size, one number or (height, width), and the side of a patch
    n_registers, cls_reduce  k, and the factor by which `neck` narrows each register before they are joined
    shuffle_rate             see `ShuffleMamba`; forward takes u and perm as there
    num_features             d, the channels of `forward_features`; `head_hidden_size` is k d / cls_reduce
    Registers have a position table of their own, so other image sizes leave it as it is.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        img_size: int | Sequence[int] = 224,
        patch_size: int = 16,
        embed_dim: int = 768,
        depth: int = 24,
        d_state: int = 16,
        n_registers: int = 12,
        cls_reduce: int = 4,
        mixer: dict | None = None,
        shuffle_rate: float = 0.1,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
    ):
        if n_registers < 1 or cls_reduce < 1 or embed_dim % cls_reduce or n_registers % cls_reduce:
            raise ValueError(
                f"n_registers={n_registers} and embed_dim={embed_dim} must be multiples of "
                f"cls_reduce={cls_reduce}, all positive"
            )
        check_rate(shuffle_rate)
        super().__init__()
        self.cls_reduce, self.shuffle_rate, d, k = cls_reduce, shuffle_rate, embed_dim, n_registers
        self.patch_embed = PatchEmbed(patch_size, in_chans, d)
        self.grid, self.embed_dim = patch_grid(self.patch_embed, img_size), d
        self.layout, self.n_tokens = "spread", k
        self.cls_token = nn.Parameter(torch.zeros(1, k, d))
        self.pos_embed_cls = nn.Parameter(torch.zeros(1, k, d))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.grid[0] * self.grid[1], d))
        if cls_reduce > 1:
            self.neck = nn.Linear(d, d // cls_reduce, bias=False)
            self.norm_neck = RMSNorm(k * d // cls_reduce, eps=1e-5)
        self.pos_drop = nn.Dropout(drop_rate)
        self.layers = nn.ModuleList(
            VimBlock(RMSNorm(d, eps=1e-5), from_slot("mixer", mixer, VimMixer, d, d_state), p)
            for p in drop_path_rates(drop_path_rate, depth)
        )
        self.norm_f = RMSNorm(d, eps=1e-5)
        self.num_features, self.head_drop = d, nn.Dropout(0.0)
        self.feature_info = block_info(depth, d, patch_size)
        self.reset_classifier(num_classes, "token" if global_pool is None else global_pool)
        init_plain_(self)
        nn.init.trunc_normal_(self.pos_embed_cls, std=0.02)
        if cls_reduce > 1:
            nn.init.trunc_normal_(self.neck.weight, std=0.02)

    @property
    def head_hidden_size(self) -> int:
        """Width of the joined registers ("token"); any other pooling of the tokens leaves the neck unused."""
        joined = self.n_tokens * self.embed_dim // self.cls_reduce
        return joined if self.global_pool == "token" else self.embed_dim

    def embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Images (b c y x) -> patches and registers, each with positions (b l d), and the grid of the patches."""
        x = self.patch_embed(x)
        grid, x = tuple(x.shape[1:3]), x.flatten(1, 2)  # (b m d)
        x = x + self.positions(self.pos_embed, grid)
        registers = self.cls_token + self.pos_embed_cls
        x = insert_tokens(x, registers, token_indices("spread", x.shape[1], self.n_tokens))  # (b l d)
        return self.pos_drop(x), grid

    def forward_blocks(
        self, x: Tensor, grid: tuple[int, int], seen: list | None = None, stop: int | None = None
    ) -> Tensor:
        """Tokens (b l d) through the blocks up to `stop`; (stream, branch) behind every block go into `seen`."""
        for i, layer in enumerate(self.layers):
            h = recomputed(self.grad_checkpointing and self.training, layer, x)
            x = x + h
            if seen is not None:
                seen.append((x, h))
            if i == stop:
                break
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.join_registers(x) if self.global_pool == "token" else self.pool_tokens(x)
        return self.classify(x, pre_logits)

    def prune_intermediate_layers(self, indices=1, prune_norm: bool = False, prune_head: bool = True) -> list[int]:
        taken = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if prune_head and self.cls_reduce > 1:  # what narrows the registers belongs to the head
            self.neck = self.norm_neck = nn.Identity()
        return taken

    def join_registers(self, x: Tensor) -> Tensor:
        """The k registers of (b l d), narrowed and side by side: (b k d/cls_reduce)"""
        registers = split_tokens(x, self.token_indices(x.shape[1]))[1]
        if self.cls_reduce == 1:
            return registers.flatten(1)
        return self.norm_neck(self.neck(registers).flatten(1))
