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

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ssmzoo.layers.image.drop_path import DropPath, drop_path_rates
from ssmzoo.layers.image.plain_backbone import PlainBackbone, insert_tokens, lecun_normal_
from ssmzoo.layers.image.ss2d import directional_scan
from ssmzoo.layers.init import A_log_s4d_real_, dt_bias_, scaled_output_
from ssmzoo.layers.norm import RMSNorm
from ssmzoo.ops import bidirectional_scan, causal_conv1d_fn, permute_tokens


class VimMixer(nn.Module):
    """Bidirectional Mamba without state: (b l d) -> (b l d).

    directions   "both" (own convolution, projections, A and D backwards), "shared" (only A differs, and the sequence is
                 turned round behind the convolution) or "forward" (plain Mamba)
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
        r = math.ceil(d_model / 16) if dt_rank == "auto" else int(dt_rank)
        self.directions, self.halve = directions, halve
        self.in_proj = nn.Linear(d_model, 2 * e, bias=bias)
        for suffix in ("", "_b") if directions == "both" else ("",):
            self.add_module(f"conv1d{suffix}", nn.Conv1d(e, e, d_conv, groups=e, bias=conv_bias))
            self.add_module(f"x_proj{suffix}", nn.Linear(e, r + 2 * d_state, bias=False))
            self.add_module(f"dt_proj{suffix}", nn.Linear(r, e))
            self.register_parameter(f"D{suffix}", nn.Parameter(torch.ones(e)))
        self.A_log = nn.Parameter(torch.empty(e, d_state))
        self.A_b_log = nn.Parameter(torch.empty(e, d_state)) if directions != "forward" else None
        self.out_proj = nn.Linear(e, d_model, bias=bias)
        self.gamma = nn.Parameter(torch.full((d_model,), float(layer_scale))) if layer_scale is not None else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """dt_proj: U(-s, s), s = r^-0.5, and Mamba's bias; dt_proj_b: torch's weight and bias 0; A = -1 .. -n."""
        s = self.dt_proj.weight.shape[1] ** -0.5
        nn.init.uniform_(self.dt_proj.weight, -s, s)
        dt_bias_(self.dt_proj.bias)
        if self.directions == "both":
            nn.init.zeros_(self.dt_proj_b.bias)
        for A_log in (self.A_log, self.A_b_log):
            if A_log is not None:
                A_log_s4d_real_(A_log)

    def forward(self, u: Tensor) -> Tensor:
        x, z = self.in_proj(u).transpose(1, 2).chunk(2, dim=1)  # (b e l)
        both = self.directions == "both"
        xs = self.convolve(bidirectional_scan(x)) if both else self.convolve(x[:, None])  # (b k e l)
        if self.directions == "shared":
            xs = bidirectional_scan(xs[:, 0])
        zs = z[:, None] if self.directions == "forward" else bidirectional_scan(z)
        ys = directional_scan(xs, *self.scan_parameters(), z=zs)
        y = ys[:, 0] if self.directions == "forward" else ys[:, 0] + ys[:, 1].flip(-1)
        y = self.out_proj((y / 2 if both and self.halve else y).transpose(1, 2))
        return y if self.gamma is None else y * self.gamma

    def convolve(self, xs: Tensor) -> Tensor:
        """Causal convolution and SiLU of every direction, (b k e l) -> (b k e l)"""
        convs = [self.conv1d, self.conv1d_b] if self.directions == "both" else [self.conv1d]
        weight = torch.cat([c.weight.squeeze(1) for c in convs])  # (ke taps)
        bias = torch.cat([c.bias for c in convs]) if self.conv1d.bias is not None else None
        return causal_conv1d_fn(xs.flatten(1, 2), weight, bias, activation="silu").unflatten(1, xs.shape[1:3])

    def scan_parameters(self) -> list[Tensor]:
        """x_proj (k r+2n e), dt_proj (k e r), dt bias (k e), A_log (k e n), D (k e)"""
        first = [self.x_proj.weight, self.dt_proj.weight, self.dt_proj.bias, self.A_log, self.D]
        if self.directions == "forward":
            return [p[None] for p in first]
        second = first.copy()
        if self.directions == "both":
            second = [self.x_proj_b.weight, self.dt_proj_b.weight, self.dt_proj_b.bias, None, self.D_b]
        second[3] = self.A_b_log
        return [torch.stack(pair) for pair in zip(first, second)]


class VimBlock(nn.Module):
    """What a block adds to the stream: DropPath(Mixer(norm(x))). (b l d) -> (b l d)"""

    def __init__(self, norm: nn.Module, mixer: nn.Module, drop_path: float):
        super().__init__()
        self.norm, self.mixer, self.drop_path = norm, mixer, DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop_path(self.mixer(self.norm(x)))


def rotary_angles(grid: Sequence[int], d: int, reference: int, like: Tensor) -> Tensor:
    """Angles (m d) of axial rotary positions: the first d/2 channels turn with the row, the others with the column.

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
    """Turn neighbouring channel pairs (x1, x2) by the angles (m d). (b m d) -> (b m d)"""
    x1, x2 = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * angles.cos() + torch.stack([-x2, x1], dim=-1).flatten(-2) * angles.sin()


class Vim(PlainBackbone):
    """Image classifier. (b c y x) -> (b num_classes); the defaults are Vim-Ti.

    img_size         built size, one number or (height, width); other images resize the positions
    patch_size, stride   of the patch convolution; stride < patch_size overlaps
    class_token      "middle", "head", "double" or "none"
    mixer            further arguments of `VimMixer`
    norm             "rms" or "ln"
    pos_embed        learned positions
    rope             None, "stream" (turn the whole residual stream before every block) or "branch" (only what the last
                     block added); rope_reference is the grid on which positions are counted
    rope_from_second rotate every token but the first, whatever the layout: the released behaviour with a class token
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
        rope_reference: int = 14,
        rope_from_second: bool = False,
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
        self.init_tokens(img_size, patch_size, stride, in_chans, embed_dim, class_token)
        self.rope, self.rope_reference, self.rope_from_second = rope, rope_reference, rope_from_second
        self.paired = paired
        self.make_embeddings(pos_embed)
        self.pos_drop = nn.Dropout(drop_rate)
        self.layers = nn.ModuleList(
            VimBlock(make_norm(embed_dim, eps=1e-5), VimMixer(embed_dim, d_state, **(mixer or {})), p)
            for p in drop_path_rates(drop_path_rate, depth)
        )
        self.norm_f = make_norm(embed_dim, eps=1e-5)
        self.init_stream(depth)
        if global_pool is None:
            global_pool = "token" if self.n_tokens else "last"
        self.init_head(self.hidden_size(), num_classes, global_pool, 0.0)
        self.num_features = embed_dim
        self.reset_parameters()

    def make_embeddings(self, pos_embed: bool) -> None:
        m, d = self.grid[0] * self.grid[1], self.embed_dim
        self.cls_token = nn.Parameter(torch.zeros(1, self.n_tokens, d)) if self.n_tokens else None
        self.pos_embed = nn.Parameter(torch.zeros(1, m + self.n_tokens, d)) if pos_embed else None

    def hidden_size(self) -> int:
        """Width of the vector that the head classifies."""
        return self.embed_dim

    def reset_parameters(self) -> None:
        """Patches LeCun normal; positions and tokens truncated normal 0.02; W_out torch's / sqrt(depth)."""
        lecun_normal_(self.patch_embed.proj)
        for table in (self.cls_token, self.pos_embed):
            if table is not None:
                nn.init.trunc_normal_(table, std=0.02)
        for layer in self.layers:
            scaled_output_(layer.mixer.out_proj.weight, len(self.layers))

    def encode(self, x: Tensor, grid: tuple[int, int], taps: list | None = None, stop: int | None = None) -> Tensor:
        angles = rotary_angles(grid, self.embed_dim, self.rope_reference, x) if self.rope else None
        x = self.turn(x, angles)
        for i, layer in enumerate(self.layers):
            if self.paired and i % 2:
                continue
            h = self.branch(i, layer, x)
            if taps is not None:
                taps += [(x + h, h)] * (2 if self.paired else 1)
            if self.paired:
                back = torch.arange(x.shape[1] - 1, -1, -1, device=x.device)
                second = self.run(self.layers[i + 1], permute_tokens(x, back))
                x, h = 2 * x, h + permute_tokens(second, back, inverse=True)
            if i == stop or i + 1 + self.paired >= len(self.layers):
                return x + h
            x = self.turn(x + h, angles) if self.rope == "stream" else x + self.turn(h, angles)
        return x

    def branch(self, i: int, layer: nn.Module, x: Tensor) -> Tensor:
        """What block i adds to the stream."""
        return self.run(layer, x)

    def turn(self, x: Tensor, angles: Tensor | None) -> Tensor:
        """Rotate the patches of a sequence (b l d); class tokens have no position."""
        if angles is None:
            return x
        if self.rope_from_second and x.shape[1] % 2:
            return torch.cat([x[:, :1], rotate(x[:, 1:], angles)], dim=1)
        if not self.n_tokens:
            return rotate(x, angles)
        still = angles.new_zeros(1, self.n_tokens, angles.shape[1])
        return rotate(x, insert_tokens(angles[None], still, self.places(x.shape[1]))[0])
