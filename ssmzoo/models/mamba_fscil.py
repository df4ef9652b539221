"""Mamba-FSCIL: few-shot class-incremental learning with a selective-scan neck and fixed class directions.

    F = backbone(image)                                                  (b c y y)
    S = MLP(F) flattened by rows + pos                                   1x1 convolutions, joint LayerNorm, LeakyReLU
    branch = mean over positions of the sum of four scans of S
    f = branch(F) + identity(F) [+ branch_new(F.detach())]               logits = W^T f / |f|

W is a simplex of unit directions, one for every class that will ever come, with pairwise inner product -1 / (K - 1); it
is drawn once and never trained. The second branch is added for the incremental sessions with its gate at zero, so that
it contributes nothing at first and still learns.

    version  scans of the map                                                       weights        gate, norm
    "ssm"    rows, rows reversed, columns, columns reversed; causal conv            shared         SiLU(z) per scan
    "ss2d"   the same directions, behind a depthwise conv 3x3                       per direction  LayerNorm, SiLU(z)

`NeckOutput.gate` is the raw z that the suppression losses act on. For "ssm" the released code adds the z of the
reversed directions, reversed along the channels instead of the positions; kept, since published losses are defined
by it.

b batch, c channels of the map, e = out_channels, y its side, l = y y, n state size, r rank of the time step, k scans.
Source: Li et al. 2024 (arXiv 2407.06136); the public project Mamba-FSCIL carries no licence and is written anew here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssmzoo.layers.image.backbone import ImageBackbone
from ssmzoo.layers.image.fused import depthwise_conv, fused_causal_convs, fused_depthwise
from ssmzoo.layers.image.patch_embed import height_width
from ssmzoo.layers.image.ss2d import init_directional_, project_by, project_steps, scan_directions, time_steps_by
from ssmzoo.layers.init import A_log_s4d_real_, dt_bias_
from ssmzoo.ops import cross_merge, cross_scan
from ssmzoo.presets import build_preset
from ssmzoo.suggest import from_slot


class NeckOutput(NamedTuple):
    """features (b e) | gate: raw z of the newest branch | residual (b e): what the newest branch was added to | scan
    parameters of the base and new branch: dt_r (b k r l), B and C (b k n l); None without a new branch"""

    features: Tensor
    gate: Tensor
    residual: Tensor
    dt: Tensor
    B: Tensor
    C: Tensor
    dt_new: Tensor | None = None
    B_new: Tensor | None = None
    C_new: Tensor | None = None


class BranchOutput(NamedTuple):
    mean: Tensor  # (b e)
    gate: Tensor
    dt: Tensor
    B: Tensor
    C: Tensor


class SharedScan(nn.Module):
    """One Mamba without output projection that reads the map in four directions with the same weights."""

    def __init__(self, dim: int, d_state: int, d_rank: int):
        super().__init__()
        self.in_proj = nn.Linear(dim, 2 * dim, bias=False)
        self.conv1d = nn.Conv1d(dim, dim, 4, groups=dim, padding=3)
        self.x_proj = nn.Linear(dim, d_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(d_rank, dim)
        self.A_log = nn.Parameter(torch.empty(dim, d_state))
        self.D = nn.Parameter(torch.ones(dim))
        A_log_s4d_real_(self.A_log)
        dt_bias_(self.dt_proj.bias)
        nn.init.uniform_(self.dt_proj.weight, -(d_rank**-0.5), d_rank**-0.5)

    def forward(self, s: Tensor) -> BranchOutput:
        """s (b y x e)"""
        x, z = self.in_proj(s).permute(0, 3, 1, 2).chunk(2, dim=1)
        xs, zs = cross_scan(x, "paired"), cross_scan(z, "paired")
        u = fused_causal_convs([self.conv1d], xs.flatten(0, 1)[:, None])  # (b4 1 e l)
        steps = project_by([self.x_proj], u)  # (b4 1 r+2n l)
        n = self.A_log.shape[1]
        dt, B, C = steps = steps.split([steps.shape[2] - 2 * n, n, n], dim=2)
        delta, bias = time_steps_by([self.dt_proj], dt)
        y = scan_directions(u, delta, B, C, self.A_log[None], self.D[None], bias, zs.flatten(0, 1)[:, None])
        mean = y.mean(-1).unflatten(0, xs.shape[:2]).sum((1, 2))
        return BranchOutput(mean, self.gate(zs, s.shape[1]), *(p.unflatten(0, xs.shape[:2])[:, 0] for p in steps))

    @staticmethod
    def gate(zs: Tensor, side: int) -> Tensor:
        """(b 4 e l) in the scan directions -> (b e l), as released: reversed ones are flipped in channels."""
        rows, rows_back, columns, columns_back = zs.unbind(1)
        columns = (columns + columns_back.flip(1)).unflatten(-1, (side, side)).mT.flatten(2)
        return rows + rows_back.flip(1) + columns


class CrossScan(nn.Module):
    """SS2D without output projection, in the order of this paper."""

    def __init__(self, dim: int, d_state: int, d_rank: int):
        super().__init__()
        self.in_proj = nn.Linear(dim, 2 * dim, bias=False)
        self.conv2d = depthwise_conv(dim)
        self.x_proj_weight = nn.Parameter(torch.empty(4, d_rank + 2 * d_state, dim))
        self.dt_projs_weight = nn.Parameter(torch.empty(4, dim, d_rank))
        self.dt_projs_bias = nn.Parameter(torch.empty(4, dim))
        self.A_logs = nn.Parameter(torch.empty(4 * dim, d_state))
        self.Ds = nn.Parameter(torch.empty(4 * dim))
        self.out_norm = nn.LayerNorm(dim)
        init_directional_(self)

    def forward(self, s: Tensor) -> BranchOutput:
        """s (b y x e)"""
        x, z = self.in_proj(s).chunk(2, dim=-1)
        xs = cross_scan(fused_depthwise(self.conv2d, x, "silu").permute(0, 3, 1, 2), "paired")
        dt, B, C = steps = project_steps(xs, self.x_proj_weight, self.A_logs.shape[1])
        delta = torch.matmul(self.dt_projs_weight, dt)
        ys = scan_directions(xs, delta, B, C, self.A_logs, self.Ds, self.dt_projs_bias)  # (b 4 e l)
        y = cross_merge(ys.unflatten(-1, s.shape[1:3]), "paired")
        y = self.out_norm(y.transpose(1, 2)).view_as(z)
        return BranchOutput((y * F.silu(z)).mean((1, 2)), z, *steps)


class PositionMlp(nn.Module):
    """In place of a scan (an ablation): a gated MLP at every position, of about as many parameters; no position sees
    another."""

    def __init__(self, dim: int, d_state: int, d_rank: int):
        super().__init__()
        self.in_proj = nn.Linear(dim, 2 * dim, bias=False)
        hidden = (2 * d_rank + 3 * d_state + 4) // 2
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, s: Tensor) -> BranchOutput:
        """s (b y x e)"""
        x, z = self.in_proj(s).chunk(2, dim=-1)
        y = self.fc2(F.silu(self.fc1(F.silu(x)))) * F.silu(z)
        none = s.new_zeros(len(s), 0)
        return BranchOutput(y.mean((1, 2)), z, none, none, none)


BRANCHES = {"ssm": SharedScan, "ss2d": CrossScan, "mlp": PositionMlp}


def projection(in_channels: int, mid: int, out_channels: int, side: int, layers: int) -> nn.Sequential:
    """1x1 convolutions with a LayerNorm over (channels, y, x) and LeakyReLU 0.1 behind all but the last."""
    steps, width = [], in_channels
    for _ in range(layers - 1):
        steps += [nn.Conv2d(width, mid, 1), nn.LayerNorm([mid, side, side]), nn.LeakyReLU(0.1)]
        width = mid
    return nn.Sequential(*steps, nn.Conv2d(width, out_channels, 1, bias=False))


class PooledLinear(nn.Module):
    """Mean over the map, then a linear projection without bias. (b c y x) -> (b e)"""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.proj = nn.Linear(in_channels, out_channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x.mean((2, 3)))


class MambaNeck(nn.Module):
    """Feature maps (b c y y) to features and what the losses need (`NeckOutput`).

    feat_size        y, the side of the maps
    version          "ssm", "ss2d", or "mlp" (no scan)
    mid_channels     width inside the MLP, 2 c unless given
    d_state, d_rank  n and r (r = n unless given)
    num_layers, num_layers_new  convolutions of the base and of the new branch's MLP
    use_residual_proj  identity = Linear(mean(F)) instead of mean(F)
    use_new_branch   the second branch of the incremental sessions
    detach_residual  with it: neither the base branch nor the identity receive gradients
    """

    def __init__(
        self,
        in_channels: int = 640,
        out_channels: int = 640,
        feat_size: int = 2,
        version: str = "ssm",
        mid_channels: int | None = None,
        d_state: int = 256,
        d_rank: int | None = None,
        num_layers: int = 2,
        num_layers_new: int | None = None,
        use_residual_proj: bool = False,
        use_new_branch: bool = False,
        detach_residual: bool = False,
    ):
        super().__init__()
        if version not in BRANCHES:
            raise ValueError(f"version is {version!r}; expected one of {', '.join(map(repr, BRANCHES))}")
        if not use_residual_proj and in_channels != out_channels:
            raise ValueError(
                f"in_channels={in_channels} and out_channels={out_channels} differ, so the identity path "
                f"needs use_residual_proj=True"
            )
        mid, rank = mid_channels or 2 * in_channels, d_rank or d_state
        self.feat_size, self.use_new_branch, self.detach_residual = feat_size, use_new_branch, detach_residual
        for suffix, layers in (("", num_layers), ("_new", num_layers_new or num_layers))[: 1 + use_new_branch]:
            self.add_module(f"mlp_proj{suffix}", projection(in_channels, mid, out_channels, feat_size, layers))
            table = nn.Parameter(torch.empty(1, feat_size**2, out_channels))
            self.register_parameter(f"pos_embed{suffix}", nn.init.trunc_normal_(table, std=0.02))
            self.add_module(f"block{suffix}", BRANCHES[version](out_channels, d_state, rank))
        self.residual_proj = PooledLinear(in_channels, out_channels) if use_residual_proj else None
        if use_new_branch:
            nn.init.zeros_(self.block_new.in_proj.weight[out_channels:].data)

    def forward(self, x: Tensor) -> NeckOutput:
        if x.ndim != 4 or x.shape[2:] != (self.feat_size, self.feat_size):
            raise ValueError(f"the neck takes square maps of side feat_size={self.feat_size}, got {tuple(x.shape)}")
        identity = x.mean((2, 3)) if self.residual_proj is None else self.residual_proj(x)
        base = self.branch(x, "")
        if not self.use_new_branch:
            return NeckOutput(base.mean + identity, base.gate, identity, base.dt, base.B, base.C)
        new = self.branch(x.detach(), "_new")
        kept = base.mean + identity
        kept = kept.detach() if self.detach_residual else kept
        return NeckOutput(kept + new.mean, new.gate, kept, base.dt, base.B, base.C, new.dt, new.B, new.C)

    def branch(self, x: Tensor, suffix: str) -> BranchOutput:
        s = getattr(self, f"mlp_proj{suffix}")(x).permute(0, 2, 3, 1)  # (b y x e)
        s = s + getattr(self, f"pos_embed{suffix}").view(1, *s.shape[1:])
        return getattr(self, f"block{suffix}")(s)


def simplex_etf(dim: int, classes: int, generator: torch.Generator | None = None) -> Tensor:
    """(dim classes): unit columns whose pairwise inner product is -1 / (classes - 1), in a random rotation."""
    if dim < classes:
        raise ValueError(f"a simplex of {classes} classes needs at least as many dimensions, got {dim}")
    U, _ = torch.linalg.qr(torch.rand(dim, classes, generator=generator))
    centred = torch.eye(classes) - 1.0 / classes
    return (classes / max(classes - 1, 1)) ** 0.5 * U @ centred


class ETFHead(nn.Module):
    """Features (b e) to cosines with the directions of the first `seen` classes. `etf_vec` is kept in checkpoints."""

    def __init__(self, dim: int, num_classes: int):
        super().__init__()
        self.num_classes = num_classes
        self.register_buffer("etf_vec", simplex_etf(dim, num_classes))

    def forward(self, f: Tensor, seen: int | None = None) -> Tensor:
        return F.normalize(f, dim=-1) @ self.etf_vec[:, :seen]


class MambaFSCIL(nn.Module):
    """Backbone, neck and fixed head. Images (b c y y) -> cosines with all class directions (b num_classes).

    backbone       any image model of the zoo, by name; backbone_args: constructor arguments that replace the preset's
    num_classes    all classes that will ever come
    img_size       side of the images: the neck is built for the side of the map that the backbone makes of it
    out_channels   width of the features, at least num_classes; the backbone's unless given
    neck           further arguments of `MambaNeck`
    """

    def __init__(
        self,
        backbone: str = "spatial_mamba",
        backbone_args: dict | None = None,
        in_chans: int = 3,
        num_classes: int = 100,
        img_size: int | Sequence[int] = 32,
        out_channels: int | None = None,
        d_state: int = 16,
        version: str = "ssm",
        neck: dict | None = None,
    ):
        super().__init__()
        sizes = {"in_chans": in_chans, "num_classes": 0, "global_pool": ""}
        self.backbone = build_preset(backbone, **(sizes | dict(backbone_args or {})))
        if not isinstance(self.backbone, ImageBackbone):
            raise ValueError(
                f"backbone {backbone!r} is no image model; choose one of `ssmzoo list models --task classification`"
            )
        self.num_classes = num_classes
        with torch.no_grad():
            width, rows, columns = self.feature_map(torch.zeros(1, in_chans, *height_width(img_size))).shape[1:]
        if rows != columns:
            raise ValueError(f"{backbone} makes a map of {rows}x{columns} positions; it must be square")
        features = out_channels or width
        self.neck_args = dict(
            in_channels=width,
            out_channels=features,
            feat_size=rows,
            version=version,
            d_state=d_state,
            use_residual_proj=features != width,
        ) | dict(neck or {})
        self.neck = from_slot("neck", self.neck_args, MambaNeck)
        self.head = ETFHead(features, num_classes)

    def feature_map(self, x: Tensor) -> Tensor:
        """(b c y y) -> (b d y' y'), the backbone's normalised last map"""
        return self.backbone.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.neck(self.feature_map(x)).features)

    def add_branch(self, detach_residual: bool = True) -> None:
        """Give the neck its second branch, which changes nothing yet; what was learnt stays."""
        old = self.neck.state_dict()
        like = next(self.neck.parameters())
        self.neck = MambaNeck(**(self.neck_args | dict(use_new_branch=True, detach_residual=detach_residual)))
        self.neck.load_state_dict(old, strict=False)
        self.neck.to(like.device, like.dtype)
