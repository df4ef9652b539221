"""ShuffleMamba: stochastic layer-wise shuffle, a regulariser for plain vision Mambas; nothing changes at inference.

While training, layer i of n sees its tokens in a random order with probability p_i = shuffle_rate * i / (n - 1), one
permutation for the whole batch, class and register tokens included, and its output goes back into place:

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

from ssmzoo.layers.image.plain_backbone import insert_tokens, split_tokens, token_places
from ssmzoo.layers.init import scaled_output_
from ssmzoo.layers.norm import RMSNorm
from ssmzoo.models.vim import Vim
from ssmzoo.models.vmamba import init_linear
from ssmzoo.ops import permute_tokens


class ShuffleMamba(Vim):
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
    ):
        if not 0 <= shuffle_rate <= 1:
            raise ValueError(f"shuffle_rate is a probability, got {shuffle_rate}")
        super().__init__(
            in_chans,
            num_classes,
            global_pool,
            img_size,
            patch_size,
            None,
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

    def reset_parameters(self) -> None:
        """As Vim, but every linear layer is truncated normal 0.02 with zero bias (also dt_proj) and cls_token is 0."""
        super().reset_parameters()
        self.apply(init_linear)
        nn.init.zeros_(self.cls_token)
        for layer in self.layers:
            scaled_output_(layer.mixer.out_proj.weight, len(self.layers))

    def forward(self, x: Tensor, u: Tensor | None = None, perm: Tensor | None = None) -> Tensor:
        return self.forward_head(self.forward_features(x, u, perm))

    def forward_features(self, x: Tensor, u: Tensor | None = None, perm: Tensor | None = None) -> Tensor:
        x, grid = self.embed(x)
        orders = self.draw_orders(x, u, perm) if self.training and self.shuffle_rate > 0 else None
        return self.norm_f(self.encode(self.pos_drop(x), grid, orders=orders))

    def draw_orders(self, x: Tensor, u: Tensor | None = None, perm: Tensor | None = None) -> Tensor:
        """(n l): per layer the identity or, with its probability, a permutation."""
        n, l = len(self.layers), x.shape[1]
        u = torch.rand(n, device=x.device) if u is None else u
        perm = torch.rand(n, l, device=x.device).argsort(1) if perm is None else perm.long()
        p = self.shuffle_rate * torch.arange(n, device=x.device) / max(n - 1, 1)
        return torch.where((u < p)[:, None], perm, torch.arange(l, device=x.device))

    def encode(
        self,
        x: Tensor,
        grid: tuple[int, int],
        taps: list | None = None,
        stop: int | None = None,
        orders: Tensor | None = None,
    ) -> Tensor:
        if orders is None:
            return super().encode(x, grid, taps, stop)
        for order, layer in zip(orders, self.layers):
            x = x + permute_tokens(self.run(layer, permute_tokens(x, order)), order, inverse=True)
        return x


class ShuffleMambaReg(ShuffleMamba):
    """Image classifier on k register tokens. (b c y x) -> (b num_classes); the defaults are the base size.

    n_registers, cls_reduce  k, and the factor by which `neck` narrows each register before they are joined
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
        self.n_registers, self.cls_reduce = n_registers, cls_reduce
        super().__init__(
            in_chans,
            num_classes,
            global_pool,
            img_size,
            patch_size,
            embed_dim,
            depth,
            d_state,
            "none",
            mixer,
            "rms",
            shuffle_rate,
            drop_rate,
            drop_path_rate,
        )

    def make_embeddings(self, pos_embed: bool) -> None:
        d, k = self.embed_dim, self.n_registers
        self.layout, self.n_tokens, self.num_prefix_tokens = "spread", k, k
        self.cls_token = nn.Parameter(torch.zeros(1, k, d))
        self.pos_embed_cls = nn.Parameter(torch.zeros(1, k, d))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.grid[0] * self.grid[1], d))
        if self.cls_reduce > 1:
            self.neck = nn.Linear(d, d // self.cls_reduce, bias=False)
            self.norm_neck = RMSNorm(self.hidden_size(), eps=1e-5)

    def hidden_size(self) -> int:
        return self.n_registers * self.embed_dim // self.cls_reduce

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """On the joined registers ("token"); any other pooling of the tokens leaves the neck unused."""
        pooled = self.global_pool if global_pool is None else global_pool
        self.head_hidden_size = self.hidden_size() if pooled == "token" else self.embed_dim
        super().reset_classifier(num_classes, global_pool)

    def reset_parameters(self) -> None:
        """As Vim; tables and registers truncated normal 0.02, and so is the neck."""
        Vim.reset_parameters(self)
        nn.init.trunc_normal_(self.pos_embed_cls, std=0.02)
        if self.cls_reduce > 1:
            nn.init.trunc_normal_(self.neck.weight, std=0.02)

    def embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        x = self.patch_embed(x)
        grid = tuple(x.shape[1:3])
        x = x.flatten(1, 2) + self.positions(self.pos_embed, grid)
        registers = self.cls_token + self.pos_embed_cls
        return insert_tokens(x, registers, token_places("spread", x.shape[1], self.n_tokens)), grid

    def pool(self, x: Tensor) -> Tensor:
        if self.global_pool != "token":
            return super().pool(x)
        registers = split_tokens(x, self.places(x.shape[1]))[1]
        if self.cls_reduce == 1:
            return registers.flatten(1)
        return self.norm_neck(self.neck(registers).flatten(1))
