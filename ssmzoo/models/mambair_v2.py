"""MambaIRv2: attentive state-space restoration, one scan that can look ahead.

What is unusual about it, against MambaIR:
- one scan instead of four: a router assigns every pixel to one of T semantic classes, pixels are sorted by class
  (stably) and scanned in that order, so that similar pixels are neighbours (semantic-guided neighbouring);
- a prompt of the pixel's class is added to C (attentive state-space equation), which lets a pixel ask for content it
  has not scanned:      h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t,      y_t = <C_t + P_t, h_t> + D u_t;
- shifted-window attention stands in front of it in every layer, each half with a feed-forward of its own.

Paper and released code differ: the prompt is *not* re-ordered with the pixels. Position t of the sorted sequence
receives the prompt of raster pixel t. All checkpoints are trained that way, so this file does the same.
The released code also keeps the Gumbel noise of the router on at test time; `routing="argmax"` leaves it out.
Source: Guo et al., MambaIRv2, arXiv 2411.15269 (CVPR 2025); MambaIR@33d7b34 (Apache-2.0), written anew here.

Letters: b batch, y x rows and columns, n = y*x tokens, d width C, e inner width, s state size, r rank, t classes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmzoo.deprecated import into, old_arguments
from ssmzoo.layers.image.backbone import recomputed
from ssmzoo.layers.image.restoration import RestorationNet, init_restoration, residual_conv
from ssmzoo.layers.image.ss2d import init_directional_
from ssmzoo.layers.image.window_attention import WindowAttention, shifted_window_attention
from ssmzoo.layers.norm import fp32
from ssmzoo.layers.plain import is_plain
from ssmzoo.ops import permute_tokens, selective_scan_fn
from ssmzoo.suggest import from_slot

ROUTINGS = ("gumbel", "argmax")


class SelectiveScan(nn.Module):
    """The attentive state-space equation in one direction; u (b n e), prompt (b n s) to (b n e), float32 inside."""

    def __init__(self, d_inner: int, d_state: int):
        super().__init__()
        r = math.ceil(d_inner / 16)
        self.split = [r, d_state, d_state]
        self.x_proj_weight = nn.Parameter(torch.empty(1, r + 2 * d_state, d_inner))
        self.dt_projs_weight = nn.Parameter(torch.empty(1, d_inner, r))
        self.dt_projs_bias = nn.Parameter(torch.empty(1, d_inner))
        self.A_logs = nn.Parameter(torch.empty(d_inner, d_state))
        self.Ds = nn.Parameter(torch.empty(d_inner))
        init_directional_(self)

    def forward(self, u: Tensor, prompt: Tensor) -> Tensor:
        dt, B, C = F.linear(u, self.x_proj_weight[0]).split(self.split, dim=-1)
        delta = F.linear(dt, self.dt_projs_weight[0])
        y = selective_scan_fn(
            fp32(u).mT,
            fp32(delta).mT,
            -torch.exp(fp32(self.A_logs)),
            fp32(B).mT,
            (fp32(C) + prompt).mT,
            fp32(self.Ds),
            delta_bias=fp32(self.dt_projs_bias[0]),
            delta_softplus=True,
        )
        return y.mT


def route(log_probs: Tensor, noisy: bool) -> tuple[Tensor, Tensor]:
    """(b n t) to classes (b n) and the same as one-hot rows (b n t) with the gradient of the softmax.

    noisy   adds Gumbel noise (temperature 1)
    """
    if noisy:
        log_probs = log_probs - torch.empty_like(log_probs).exponential_().log()
    soft = log_probs.softmax(dim=-1)
    classes = soft.argmax(dim=-1)
    hard = torch.zeros_like(soft).scatter_(-1, classes[..., None], 1.0)
    return classes, hard - soft.detach() + soft


def whole_table(embedding: nn.Module, rows: int, device: torch.device) -> Tensor:
    """All rows of an nn.Embedding (rows d), looked up unless it may be read."""
    return embedding.weight if is_plain(embedding) else embedding(torch.arange(rows, device=device))


class ASSM(nn.Module):
    """Attentive state-space module on normed tokens (b n d): route, sort, scan with prompts, put back."""

    def __init__(self, dim: int, d_state: int, num_tokens: int, inner_rank: int, mlp_ratio: float, routing: str):
        super().__init__()
        e = int(dim * mlp_ratio)
        self.routing, self.pool_size = routing, (num_tokens, inner_rank)
        self.selectiveScan = SelectiveScan(e, d_state)
        self.out_norm, self.out_proj = nn.LayerNorm(e), nn.Linear(e, dim)
        self.in_proj = nn.Sequential(nn.Conv2d(dim, e, 1))
        self.CPE = nn.Sequential(nn.Conv2d(e, e, 3, padding=1, groups=e))
        self.embeddingB = nn.Embedding(num_tokens, inner_rank)
        self.route = nn.Sequential(
            nn.Linear(dim, dim // 3), nn.GELU(), nn.Linear(dim // 3, num_tokens), nn.LogSoftmax(dim=-1)
        )
        nn.init.uniform_(self.embeddingB.weight, -1 / num_tokens, 1 / num_tokens)

    def forward(self, x: Tensor, size: tuple[int, int], embeddingA: nn.Embedding) -> Tensor:
        tokens, rank = self.pool_size
        pool = whole_table(self.embeddingB, tokens, x.device) @ whole_table(embeddingA, rank, x.device)  # (t s)
        classes, one_hot = route(self.route(x), noisy=self.routing == "gumbel")  # (b n), (b n t)
        order = classes.argsort(dim=-1, stable=True)  # (b n)
        u = self.in_proj(x.mT.unflatten(-1, size))  # (b e y x)
        u = (u * torch.sigmoid(self.CPE(u))).flatten(2).mT  # (b n e)
        y = self.selectiveScan(permute_tokens(u, order), fp32(one_hot @ pool))  # the prompt keeps raster order
        y = self.out_proj(self.out_norm(y).to(x.dtype))
        return permute_tokens(y, order, inverse=True)


class DepthwiseConv(nn.Module):
    """GELU(depthwise k x k convolution), (b c y x) to the same."""

    def __init__(self, channels: int, kernel_size: int):
        super().__init__()
        conv = nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)
        self.depthwise_conv = nn.Sequential(conv, nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        return self.depthwise_conv(x)


class ConvFFN(nn.Module):
    """z = GELU(fc1 x); fc2(z + GELU(dwconv z)), tokens (b n d)."""

    def __init__(self, dim: int, hidden: int, kernel_size: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.dwconv = DepthwiseConv(hidden, kernel_size)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        z = F.gelu(self.fc1(x))
        return self.fc2(z + self.dwconv(z.mT.unflatten(-1, size)).flatten(2).mT)


class SpatialGate(nn.Module):
    """[z1, z2] -> z1 * dwconv5x5(LayerNorm(z2)), tokens (b n c) to (b n c/2)."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.conv = nn.Conv2d(channels, channels, 5, padding=2, groups=channels)

    def forward(self, z: Tensor, size: tuple[int, int]) -> Tensor:
        z1, z2 = z.chunk(2, dim=-1)
        return z1 * self.conv(self.norm(z2).mT.unflatten(-1, size)).flatten(2).mT


class GatedMLP(nn.Module):
    """fc2(gate(GELU(fc1 x))), tokens (b n d): the feed-forward of the light model."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        if hidden % 2:
            raise ValueError(f"int(embed_dim * mlp_ratio) = {hidden} is odd; the gated feed-forward needs an even one")
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden // 2, dim)
        self.sg = SpatialGate(hidden // 2)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        return self.fc2(self.sg(F.gelu(self.fc1(x)), size))


class AttentiveLayer(nn.Module):
    """Window attention and ASSM, each followed by a feed-forward; tokens (b n d) of a map whose size is `size`.

        a = x + WinAttn(LN1 x);  a = a + FFN1(LN2 a);  x1 = s1 * x + a
        b = x1 + ASSM(LN3 x1);   b = b + FFN2(LN4 b);  out = s2 * x1 + b

    The residual is counted 1 + s times; s starts at 1e-4.
    """

    def __init__(
        self,
        dim: int,
        d_state: int,
        num_heads: int,
        window_size: int,
        shift: int,
        inner_rank: int,
        num_tokens: int,
        mlp_ratio: float,
        qkv_bias: bool,
        routing: str,
        ffn,
    ):
        super().__init__()
        self.shift = shift
        for i in range(1, 5):
            setattr(self, f"norm{i}", nn.LayerNorm(dim))
        self.scale1, self.scale2 = nn.Parameter(torch.full((dim,), 1e-4)), nn.Parameter(torch.full((dim,), 1e-4))
        self.wqkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.win_mhsa = WindowAttention(dim, window_size, num_heads)
        self.assm = ASSM(dim, d_state, num_tokens, inner_rank, mlp_ratio, routing)
        self.convffn1, self.convffn2 = ffn(), ffn()
        self.embeddingA = nn.Embedding(inner_rank, d_state)
        nn.init.uniform_(self.embeddingA.weight, -1 / inner_rank, 1 / inner_rank)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        qkv = self.wqkv(self.norm1(x)).unflatten(1, size)  # (b y x 3d)
        a = x + shifted_window_attention(qkv, self.win_mhsa, self.shift).flatten(1, 2)
        a = a + self.convffn1(self.norm2(a), size)
        x1 = self.scale1 * x + a
        b = x1 + self.assm(self.norm3(x1), size, self.embeddingA)
        b = b + self.convffn2(self.norm4(b), size)
        return self.scale2 * x1 + b


class ASSB(nn.Module):
    """A residual group: x + conv(layers(x)), tokens (b n d)."""

    def __init__(self, layers: list[AttentiveLayer], dim: int, resi_connection: str):
        super().__init__()
        self.residual_group = nn.ModuleDict({"layers": nn.ModuleList(layers)})
        self.conv = residual_conv(dim, resi_connection)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        y = x
        for layer in self.residual_group["layers"]:
            y = layer(y, size)
        return x + self.conv(y.mT.unflatten(-1, size)).flatten(2).mT


class SwinOptions(NamedTuple):
    """See `MambaIRv2`."""

    qkv_bias: bool = True
    patch_norm: bool = True
    ape: int = 0


@old_arguments(qkv_bias=into("swin", "qkv_bias"), patch_norm=into("swin", "patch_norm"), ape=into("swin", "ape"))
class MambaIRv2(RestorationNet):
    """Images (b c y x) in [0, 1] to restored images (b c s*y s*x), any size. The defaults are the Base model's body.

    upscale, upsampler         scale s and reconstruction head, see `RestorationNet`
    embed_dim, depths          width C and layers per residual group
    d_state, mlp_ratio         state size; int(C * mlp_ratio) is the inner width of the scan and of the feed-forward
    num_heads                  attention heads, one number per group or one for all
    window_size                side of a window in pixels; images are mirrored up to a multiple of it
    inner_rank, num_tokens     rank and number of classes of the prompt pool
    convffn_kernel_size        taps of the feed-forward's depthwise convolution; 5 in the light model
    light                      gated feed-forward of the light model
    swin                       {"qkv_bias": True, "patch_norm": True, "ape": 0}, as in all published models: bias of the
                               attention's projection, norm of the first tokens, side of the padded image for a
                               learned position table (0: none)
    bicubic_skip               see `RestorationNet`
    routing                    'gumbel': classes sampled, also at test time, as released; 'argmax': the likeliest
    """

    def __init__(
        self,
        upscale: int = 2,
        upsampler: str = "auto",
        in_chans: int = 3,
        embed_dim: int = 174,
        depths: tuple[int, ...] = (6, 6, 6, 6, 6, 6),
        d_state: int = 16,
        num_heads: int | tuple[int, ...] = 6,
        window_size: int = 16,
        inner_rank: int = 64,
        num_tokens: int = 128,
        convffn_kernel_size: int = 5,
        mlp_ratio: float = 2.0,
        img_range: float = 1.0,
        resi_connection: str = "1conv",
        light: bool = False,
        swin: dict | None = None,
        routing: str = "gumbel",
        bicubic_skip: bool = False,
    ):
        super().__init__(upscale, in_chans, embed_dim, img_range, upsampler, resi_connection, bicubic_skip)
        if routing not in ROUTINGS:
            raise ValueError(f"routing is {routing!r}; expected one of {', '.join(ROUTINGS)}")
        if light and convffn_kernel_size != 5:
            raise ValueError(f"convffn_kernel_size is {convffn_kernel_size}; the light feed-forward has 5 x 5 taps")
        heads = (num_heads,) * len(depths) if isinstance(num_heads, int) else tuple(num_heads)
        if len(heads) != len(depths):
            raise ValueError(f"num_heads has {len(heads)} entries and depths {len(depths)}; give one per group")
        self.window_size, (qkv_bias, patch_norm, ape) = window_size, from_slot("swin", swin, SwinOptions)
        hidden = int(embed_dim * mlp_ratio)

        def ffn() -> nn.Module:
            return GatedMLP(embed_dim, hidden) if light else ConvFFN(embed_dim, hidden, convffn_kernel_size)

        def layer(i: int, num_heads: int) -> AttentiveLayer:
            shift = 0 if i % 2 == 0 else window_size // 2
            return AttentiveLayer(
                embed_dim,
                d_state,
                num_heads,
                window_size,
                shift,
                inner_rank,
                num_tokens,
                mlp_ratio,
                qkv_bias,
                routing,
                ffn,
            )

        self.patch_embed = nn.ModuleDict({"norm": nn.LayerNorm(embed_dim)} if patch_norm else {})
        self.absolute_pos_embed = nn.Parameter(torch.empty(1, ape**2, embed_dim)) if ape else None
        self.layers = nn.ModuleList(
            ASSB([layer(i, h) for i in range(depth)], embed_dim, resi_connection) for depth, h in zip(depths, heads)
        )
        self.norm = nn.LayerNorm(embed_dim)
        if ape:
            nn.init.trunc_normal_(self.absolute_pos_embed, std=0.02)
        self.apply(init_restoration)

    def forward(self, x: Tensor) -> Tensor:
        return self.reconstruct(self.forward_features(x), x)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (b c y x) -> deep features in front of the head (b d y x), y and x in multiples of the window"""
        shallow = self.conv_first(self.normalise(x))  # (b d y x)
        size, x = tuple(shallow.shape[2:]), shallow.flatten(2).mT  # (b n d)
        if "norm" in self.patch_embed:
            x = self.patch_embed["norm"](x)
        if self.absolute_pos_embed is not None:
            if x.shape[1] != self.absolute_pos_embed.shape[1]:
                raise ValueError(
                    f"the padded image is {size[0]} x {size[1]}; a model with a position table takes "
                    f"exactly {self.absolute_pos_embed.shape[1]} pixels (ape squared)"
                )
            x = x + self.absolute_pos_embed
        for group in self.layers:
            x = recomputed(self.grad_checkpointing, group, x, size)
        x = self.norm(x).mT.unflatten(-1, size).contiguous()  # (b d y x)
        return self.conv_after_body(x) + shallow
