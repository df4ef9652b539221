"""Vim (Vision Mamba): a plain encoder of bidirectional Mamba blocks with the class token in the middle.

    X = patches with the class token at m // 2, + positions
    X <- X + DropPath(Mixer(RMSNorm(X)))         24 times;      logits = W RMSNorm(X)[class token]

    Mixer:  [x, z] = W_in u;   y = F(x, z; theta) + flip(F(flip x, flip z; theta_b));   out = W_out y / 2
    F: causal conv, SiLU, selective scan, gate SiLU(z), as in Mamba; only W_in and W_out are shared by the directions

The released code adds branch and stream at the start of the next block; this is the same sum. It reads positions of a
fixed size; here other images resize the table, with the class token's row where it is (the released loaders take the
first row for it). Its strings and switches ("v2", if_cls_token, ...) are arguments here and are read by
`official_vim` only.

b batch, m patches, l tokens, d width, e = 2 d, n state size, r rank of the time step, k = 2 directions.
Source: Zhu et al. 2024 (arXiv 2401.09417); released code hustvl/Vim@dd0358a (Apache-2.0), written anew here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ssmzoo.deprecated import into, old_arguments
from ssmzoo.layers.image.backbone import recomputed
from ssmzoo.layers.image.drop_path import DropPath, drop_path_rates
from ssmzoo.layers.image.fused import fused_causal_convs
from ssmzoo.layers.image.patch_embed import PatchEmbed
from ssmzoo.layers.image.plain_backbone import (
    LAYOUTS,
    PlainBackbone,
    block_info,
    insert_tokens,
    lecun_normal_,
    patch_grid,
    token_indices,
)
from ssmzoo.layers.image.ss2d import project_by, scan_directions, time_steps_by
from ssmzoo.layers.init import A_log_s4d_real_, MambaInit, scaled_output_, time_step_rank
from ssmzoo.layers.norm import RMSNorm
from ssmzoo.ops import bidirectional_scan, permute_tokens
from ssmzoo.suggest import from_slot


class VimMixer(nn.Module):
    """Bidirectional Mamba without state: (b l d) -> (b l d).

    directions   "both" (own convolution, projections, A and D backwards), "shared" (only A differs, and the sequence is
                 reversed behind the convolution) or "forward" (plain Mamba)
    halve        divide the sum of two own directions by 2
    layer_scale  start value of a learned factor per channel behind W_out, or None
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | str = "auto",
        conv_bias: bool = True,
        bias: bool = False,
        directions: str = "both",
        halve: bool = True,
        layer_scale: float | None = None,
    ):
        super().__init__()
        if directions not in ("both", "shared", "forward"):
            raise ValueError(f"directions is {directions!r}; expected 'both', 'shared' or 'forward'")
        e = self.d_inner = int(expand * d_model)
        r = time_step_rank(dt_rank, d_model)
        self.directions, self.halve = directions, halve
        self.in_proj = nn.Linear(d_model, 2 * e, bias=bias)
        for suffix in ("", "_b") if directions == "both" else ("",):
            self.add_module(f"conv1d{suffix}", nn.Conv1d(e, e, d_conv, groups=e, bias=conv_bias, padding=d_conv - 1))
            self.add_module(f"x_proj{suffix}", nn.Linear(e, r + 2 * d_state, bias=False))
            self.add_module(f"dt_proj{suffix}", nn.Linear(r, e))
            self.register_parameter(f"D{suffix}", nn.Parameter(torch.ones(e)))
        self.A_log = nn.Parameter(torch.empty(e, d_state))
        self.A_b_log = nn.Parameter(torch.empty(e, d_state)) if directions != "forward" else None
        self.out_proj = nn.Linear(e, d_model, bias=bias)
        self.gamma = nn.Parameter(torch.full((d_model,), float(layer_scale))) if layer_scale is not None else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """dt_proj: as in Mamba; dt_proj_b: torch's weight and bias 0; A = -1 .. -n."""
        MambaInit().time_step_(self.dt_proj)
        if self.directions == "both":
            nn.init.zeros_(self.dt_proj_b.bias)
        for A_log in (self.A_log, self.A_b_log):
            if A_log is not None:
                A_log_s4d_real_(A_log)

    def forward(self, u: Tensor) -> Tensor:
        x, z = self.in_proj(u).transpose(1, 2).chunk(2, dim=1)  # (b e l)
        both = self.directions == "both"
        convs = [self.conv1d, self.conv1d_b] if both else [self.conv1d]
        xs = fused_causal_convs(convs, bidirectional_scan(x) if both else x[:, None])  # (b k e l)
        if self.directions == "shared":
            xs = bidirectional_scan(xs[:, 0])
        zs = z[:, None] if self.directions == "forward" else bidirectional_scan(z)
        ys = self.scan(xs, zs)
        y = ys[:, 0] if self.directions == "forward" else ys[:, 0] + ys[:, 1].flip(-1)
        y = self.out_proj((y / 2 if both and self.halve else y).transpose(1, 2))
        return y if self.gamma is None else y * self.gamma

    def scan(self, xs: Tensor, zs: Tensor) -> Tensor:
        """The selective scans of every direction with gates zs, (b k e l) -> (b k e l)"""
        own = {"both": ("", "_b"), "shared": ("", ""), "forward": ("",)}[self.directions]
        x_projs, dt_projs, Ds = ([getattr(self, name + s) for s in own] for name in ("x_proj", "dt_proj", "D"))
        A_log = torch.stack([self.A_log, self.A_b_log][: len(own)])
        n = A_log.shape[-1]
        steps = project_by(x_projs, xs)  # (b k r+2n l)
        dt, B, C = steps.split([steps.shape[2] - 2 * n, n, n], dim=2)
        delta, bias = time_steps_by(dt_projs, dt)
        return scan_directions(xs, delta, B, C, A_log, torch.stack(Ds), bias, zs)


class VimBlock(nn.Module):
    """What a block adds to the stream: DropPath(Mixer(norm(x))). (b l d) -> (b l d)"""

    def __init__(self, norm: nn.Module, mixer: nn.Module, drop_path: float):
        super().__init__()
        self.norm, self.mixer, self.drop_path = norm, mixer, DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop_path(self.mixer(self.norm(x)))


def rotary_angles(grid: Sequence[int], d: int, reference: int, like: Tensor) -> Tensor:
    """Angles (m d) of axial rotary positions: the first d/2 channels rotate with the row, the others with the column.

    f_i = 10000^(-2 i / (d/2)), i < d/4, each for two neighbouring channels; positions run to `reference` on every axis.
    """
    f = 10000.0 ** (-torch.arange(0, d // 2, 2, device=like.device, dtype=torch.float32) / (d // 2))
    rows, columns = (
        torch.outer(torch.arange(side, device=like.device) / side * reference, f).repeat_interleave(2, 1)
        for side in grid
    )  # (side d/2)
    axes = [rows[:, None].expand(-1, grid[1], -1), columns[None].expand(grid[0], -1, -1)]
    return torch.cat(axes, dim=-1).flatten(0, 1)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate neighbouring channel pairs (x1, x2) by the angles (m d). (b m d) -> (b m d)"""
    x1, x2 = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * angles.cos() + torch.stack([-x2, x1], dim=-1).flatten(-2) * angles.sin()


@old_arguments(rope_reference=into("rope_options", "reference"), rope_from_second=into("rope_options", "from_second"))
class Vim(PlainBackbone):
    """Image classifier. (b c y x) -> (b num_classes); the defaults are Vim-Ti.

    img_size         built size, one number or (height, width); other images resize the positions
    patch_size, stride   of the patch convolution; stride < patch_size overlaps
    class_token      "middle", "head", "double" or "none"
    mixer            further arguments of `VimMixer`
    norm             "rms" or "ln"
    pos_embed        learned positions
    rope             None, "stream" (rotate the whole residual stream before every block) or "branch" (only what the
                     last block added)
    rope_options     {"reference": 14, "from_second": False}: the grid on which positions are counted; rotate every
                     token but the first, whatever the layout, as released with a class token
    paired           blocks in pairs, the second on the reversed sequence; the stream is counted twice, as released
    global_pool      see `PlainBackbone`; "token" unless there is no class token
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str | None = None,
        img_size: int | Sequence[int] = 224,
        patch_size: int = 16,
        stride: int | None = None,
        embed_dim: int = 192,
        depth: int = 24,
        d_state: int = 16,
        class_token: str = "middle",
        mixer: dict | None = None,
        norm: str = "rms",
        pos_embed: bool = True,
        rope: str | None = None,
        rope_options: dict | None = None,
        paired: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
    ):
        super().__init__()
        if norm not in ("rms", "ln") or rope not in (None, "stream", "branch"):
            raise ValueError(f"norm is 'rms' or 'ln' (got {norm!r}), rope is None, 'stream' or 'branch' (got {rope!r})")
        if rope and embed_dim % 4:
            raise ValueError(f"rotary positions need an embed_dim that 4 divides, got {embed_dim}")
        if paired and depth % 2:
            raise ValueError(f"paired blocks need an even depth, got {depth}")
        make_norm = RMSNorm if norm == "rms" else nn.LayerNorm
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim, stride)
        self.grid, self.embed_dim = patch_grid(self.patch_embed, img_size), embed_dim
        self.layout, self.n_tokens = class_token, LAYOUTS.get(class_token, 0)
        patches = self.grid[0] * self.grid[1]
        token_indices(class_token, patches, self.n_tokens)  # refuses an unknown layout
        self.rope, self.paired = rope, paired
        self.rope_options = from_slot("rope_options", rope_options, RotaryOptions)
        self.cls_token = nn.Parameter(torch.zeros(1, self.n_tokens, embed_dim)) if self.n_tokens else None
        self.pos_embed = nn.Parameter(torch.zeros(1, patches + self.n_tokens, embed_dim)) if pos_embed else None
        self.pos_drop = nn.Dropout(drop_rate)
        self.layers = nn.ModuleList(
            VimBlock(make_norm(embed_dim, eps=1e-5), from_slot("mixer", mixer, VimMixer, embed_dim, d_state), p)
            for p in drop_path_rates(drop_path_rate, depth)
        )
        self.norm_f = make_norm(embed_dim, eps=1e-5)
        self.num_features, self.head_drop = embed_dim, nn.Dropout(0.0)
        self.feature_info = block_info(depth, embed_dim, self.patch_embed.stride)
        if global_pool is None:
            global_pool = "token" if self.n_tokens else "last"
        self.reset_classifier(num_classes, global_pool)
        init_plain_(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (b c y x) -> normed tokens (b l d)"""
        return self.norm_f(self.forward_blocks(*self.embed(x)))

    def embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Images (b c y x) -> tokens with positions (b l d), and the grid of the patches."""
        x = self.patch_embed(x)
        grid, x = tuple(x.shape[1:3]), x.flatten(1, 2)  # (b m d)
        if self.n_tokens:
            x = insert_tokens(x, self.cls_token, token_indices(self.layout, x.shape[1], self.n_tokens))  # (b l d)
        x = x if self.pos_embed is None else x + self.positions(self.pos_embed, grid)
        return self.pos_drop(x), grid

    def forward_blocks(
        self, x: Tensor, grid: tuple[int, int], seen: list | None = None, stop: int | None = None
    ) -> Tensor:
        """Tokens (b l d) through the blocks up to `stop`; (stream, branch) behind every block go into `seen`."""
        recompute = self.grad_checkpointing and self.training
        angles = rotary_angles(grid, self.embed_dim, self.rope_options.reference, x) if self.rope else None
        x = self.rotate(x, angles)
        for i in range(0, len(self.layers), 2 if self.paired else 1):
            h = recomputed(recompute, self.layers[i], x)
            if seen is not None:
                seen += [(x + h, h)] * (2 if self.paired else 1)
            if self.paired:
                back = torch.arange(x.shape[1] - 1, -1, -1, device=x.device)
                second = recomputed(recompute, self.layers[i + 1], permute_tokens(x, back))
                x, h = 2 * x, h + permute_tokens(second, back, inverse=True)
            if i == stop or i + 1 + self.paired >= len(self.layers):
                return x + h
            x = self.rotate(x + h, angles) if self.rope == "stream" else x + self.rotate(h, angles)
        return x

    def rotate(self, x: Tensor, angles: Tensor | None) -> Tensor:
        """Rotary positions of the patches of a sequence (b l d); class tokens have none."""
        if angles is None:
            return x
        if self.rope_options.from_second and x.shape[1] % 2:
            return torch.cat([x[:, :1], rotate(x[:, 1:], angles)], dim=1)
        if not self.n_tokens:
            return rotate(x, angles)
        still = angles.new_zeros(1, self.n_tokens, angles.shape[1])
        return rotate(x, insert_tokens(angles[None], still, self.token_indices(x.shape[1]))[0])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return self.classify(self.pool_tokens(x), pre_logits)


class RotaryOptions(NamedTuple):
    """See `Vim`."""

    reference: int = 14
    from_second: bool = False


def init_plain_(model: PlainBackbone) -> None:
    """Patches LeCun normal; positions and tokens truncated normal 0.02; W_out of the mixers torch's / sqrt(depth)."""
    lecun_normal_(model.patch_embed.proj)
    for table in (model.cls_token, model.pos_embed):
        if table is not None:
            nn.init.trunc_normal_(table, std=0.02)
    for layer in model.layers:
        scaled_output_(layer.mixer.out_proj.weight, len(model.layers))
