"""Selective scans of a 2-D map in several directions, each with its own projections (VMamba's SS2D).

    [x, z] = split(W_in u)                       z only with a gate
    x = act(depthwise conv(x))
    for each direction k:   [dt_r, B, C] = Wx_k x_k,  delta = softplus(Wdt_k dt_r + b_k),  A = -exp(A_logs_k)
                            s_t = exp(delta_t A) s_{t-1} + delta_t B_t x_t,   y_k = <C_t, s_t> + D_k x_t
    y = out_act(out_norm(sum of the y_k, each back at its positions)) * gate(z)
    out = W_out y

Scan directions of "cross": rows, columns, rows reversed, columns reversed. The sum has no factor 1/4.

b batch, y x rows and columns, l = y x, k = 4 scan directions, d model width, e inner width, n state size, r rank of dt.
Source: Liu et al. 2024, VMamba (arXiv 2401.10166), section 4; parameter names of MzeroMiko/VMamba (MIT).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssmzoo.deprecated import old_arguments
from ssmzoo.layers.image.fused import depthwise_conv, fused_depthwise, fused_gated_norm, fused_linear
from ssmzoo.layers.image.mlp import activation
from ssmzoo.layers.init import A_log_s4d_real_, dt_bias_, time_step_rank
from ssmzoo.layers.norm import fp32
from ssmzoo.layers.plain import is_plain
from ssmzoo.ops import (
    bidirectional_scan,
    cross_merge,
    cross_scan,
    cross_selective_scan,
    mamba_chunk_scan_combined,
    selective_scan_fn,
)

SCANS = ("cross", "unidirectional", "bidirectional", "cascade")


def project_steps(xs: Tensor, x_proj: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs of the scans: xs (b k e l), x_proj (k r+2n e) -> dt_r (b k r l), B and C (b k n l)"""
    return torch.matmul(x_proj, xs).split([x_proj.shape[1] - 2 * n, n, n], dim=2)


def scan_directions(
    xs: Tensor,
    delta: Tensor,
    B: Tensor,
    C: Tensor,
    A_log: Tensor,
    D: Tensor,
    dt_bias: Tensor | None = None,
    z: Tensor | None = None,
) -> Tensor:
    """k selective scans side by side: xs, delta and gates z (b k e l), B and C (b k n l), dt_bias (k e) -> (b k e l)"""
    k, e = xs.shape[1:3]
    y = selective_scan_fn(
        xs.flatten(1, 2),
        delta.flatten(1, 2),
        -torch.exp(fp32(A_log)).reshape(k * e, -1),
        B,
        C,
        fp32(D).flatten(),
        z=None if z is None else z.flatten(1, 2),
        delta_bias=None if dt_bias is None else fp32(dt_bias).flatten(),
        delta_softplus=True,
    )
    return y.unflatten(1, (k, e))


def directional_scan(
    xs: Tensor, x_proj: Tensor, dt_proj: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor, z: Tensor | None = None
) -> Tensor:
    """Independent selective scans of k sequences side by side.

    xs, z       (b k e l)  inputs and optional SiLU gates
    x_proj      (k r+2n e), dt_proj (k e r), dt_bias (k e), A_log (k e n), D (k e): the projections of every scan
    returns     (b k e l)
    """
    dt, B, C = project_steps(xs, x_proj, A_log.shape[-1])
    return scan_directions(xs, torch.matmul(dt_proj, dt), B, C, A_log, D, dt_bias, z)


def project_by(linears: Sequence[nn.Module], xs: Tensor) -> Tensor:
    """Sequence k through linear layer k, (b k e l) -> (b k out l); bias and all."""
    if is_plain(*linears) and linears[0].bias is None:
        return torch.matmul(torch.stack([linear.weight for linear in linears]), xs)
    return torch.stack([linear(x.mT).mT for linear, x in zip(linears, xs.unbind(1))], dim=1)


def time_steps_by(linears: Sequence[nn.Module], dt: Tensor) -> tuple[Tensor, Tensor | None]:
    """dt_r (b k r l) -> time steps before the softplus (b k e l) and a bias (k e) that the scan adds, if it is to."""
    if is_plain(*linears):
        weight, bias = (torch.stack([getattr(p, name) for p in linears]) for name in ("weight", "bias"))
        return torch.matmul(weight, dt), bias
    return project_by(linears, dt), None


def init_directional_(module: nn.Module, rule: str = "mamba") -> None:
    """Initial values of x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs and Ds of a module.

    x_proj   U(-s, s), s = e^-0.5 (nn.Linear's default); D = 1
    "mamba"  dt weight U(-s, s), s = r^-0.5; dt bias: softplus gives 1e-3 .. 0.1 tokens, log-uniform; A = -1 .. -n
    "normal" A_logs ~ N(0, 1), dt weight and bias 0.1 N(0, 1)
    "zero"   A_logs = 0, dt weight and bias 0.1 U(0, 1)
    """
    with torch.no_grad():
        e, r = module.dt_projs_weight.shape[-2:]
        module.x_proj_weight.uniform_(-(e**-0.5), e**-0.5)
        module.Ds.fill_(1.0)
        if rule == "mamba":
            module.dt_projs_weight.uniform_(-(r**-0.5), r**-0.5)
            dt_bias_(module.dt_projs_bias)
            A_log_s4d_real_(module.A_logs)
        elif rule == "normal":
            module.A_logs.normal_()
            module.dt_projs_weight.normal_(std=0.1)
            module.dt_projs_bias.normal_(std=0.1)
        elif rule == "zero":
            module.A_logs.zero_()
            module.dt_projs_weight.uniform_(0, 0.1)
            module.dt_projs_bias.uniform_(0, 0.1)
        else:
            raise ValueError(f"ssm_init is {rule!r}; expected 'mamba', 'normal' or 'zero'")


class DepthwiseMapConv(nn.Module):
    """A depthwise convolution of channels-last maps (b y x d), one level down as some checkpoints have it."""

    def __init__(
        self,
        dim: int,
        kernel: int = 3,
        stride: int = 1,
        bias: bool = True,
        act: str | None = None,
        rectify: bool = False,
    ):
        super().__init__()
        self.conv, self.act, self.rectify = depthwise_conv(dim, kernel, stride, bias), act, rectify

    def forward(self, x: Tensor) -> Tensor:
        return fused_depthwise(self.conv, x, self.act, rectify=self.rectify)


class SpatialSoftmax(nn.Module):
    """Softmax over the positions of a map (b y x d), channel by channel."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1, 2).softmax(dim=1).view_as(x)


OUT_NORMS = {
    "layer": nn.LayerNorm,
    "layer_conv": lambda dim: nn.Sequential(nn.LayerNorm(dim), DepthwiseMapConv(dim, bias=False)),
    "conv": lambda dim: DepthwiseMapConv(dim, bias=False),
    "softmax": lambda dim: SpatialSoftmax(),
    "sigmoid": lambda dim: nn.Sigmoid(),
    "none": lambda dim: nn.Identity(),
}


def move_out_act(arguments: dict, act: str | None) -> None:
    if act:
        arguments["out_norm"] = f"{arguments.get('out_norm', 'layer')}+{act}"


@old_arguments(out_act=move_out_act)
class SS2D(nn.Module):
    """Token mixer of channels-last maps (b y x d) -> (b y x d).

    d_model, d_state, ssm_ratio, dt_rank   d, n, e = int(ssm_ratio d), r or "auto" = ceil(d / 16)
    d_conv, conv_bias   side of the depthwise convolution (1: none) and whether it has a bias
    act      activation behind the convolution
    gate     None, "act" (multiply by act(z)) or "linear" (by z itself)
    out_norm "layer", "layer_conv" (then a depthwise 3x3), "conv", "softmax" (over positions), "sigmoid", "none"; an
             activation may follow ("layer+gelu")
    scans    "cross", "unidirectional" (four times by rows), "bidirectional" (rows, rows, both reversed) or "cascade"
             (every row by itself, then every column, forwards and backwards)
    ssm_init see `init_directional_`
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        ssm_ratio: float = 2.0,
        dt_rank: int | str = "auto",
        d_conv: int = 3,
        conv_bias: bool = True,
        act: str = "silu",
        gate: str | None = "act",
        out_norm: str = "layer",
        scans: str = "cross",
        ssm_init: str = "mamba",
        dropout: float = 0.0,
    ):
        super().__init__()
        out_norm, _, out_act = out_norm.partition("+")
        if gate not in (None, "act", "linear"):
            raise ValueError(f"gate is {gate!r}; expected None, 'act' or 'linear'")
        if scans not in SCANS:
            raise ValueError(f"scans is {scans!r}; expected one of {', '.join(SCANS)}")
        if out_norm not in OUT_NORMS:
            raise ValueError(f"out_norm is {out_norm!r}; expected one of {', '.join(OUT_NORMS)}")
        e = self.d_inner = int(ssm_ratio * d_model)
        self.dt_rank = time_step_rank(dt_rank, d_model)
        self.d_state, self.gate, self.scans, self.ssm_init = d_state, gate, scans, ssm_init
        self.in_proj = nn.Linear(d_model, e if gate is None else 2 * e, bias=False)
        self.act, self.act_name = activation(act), act
        self.conv2d = depthwise_conv(e, d_conv, bias=conv_bias) if d_conv > 1 else None
        self.out_act = activation(out_act) if out_act else nn.Identity()
        self.make_scan_parameters()
        self.joined = (gate, act, out_norm, out_act) == ("act", "silu", "layer", "")  # norm and gate in one operator
        self.out_norm = OUT_NORMS[out_norm](e)
        self.out_proj = nn.Linear(e, d_model, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.reset_parameters()

    def make_scan_parameters(self) -> None:
        e, n, r = self.d_inner, self.d_state, self.dt_rank
        self.x_proj_weight = nn.Parameter(torch.empty(4, r + 2 * n, e))
        self.dt_projs_weight = nn.Parameter(torch.empty(4, e, r))
        self.dt_projs_bias = nn.Parameter(torch.empty(4, e))
        self.A_logs = nn.Parameter(torch.empty(4 * e, n))
        self.Ds = nn.Parameter(torch.empty(4 * e))

    def reset_parameters(self) -> None:
        """The scan's parameters by `init_directional_`, projections truncated normal (std 0.02), the rest by torch."""
        init_directional_(self, self.ssm_init)
        for linear in (self.in_proj, self.out_proj):
            nn.init.trunc_normal_(linear.weight, std=0.02)

    def forward(self, u: Tensor) -> Tensor:
        x, z = fused_linear(self.in_proj, u), None
        if self.gate:
            x, z = x.chunk(2, dim=-1)
        x = self.act(x) if self.conv2d is None else fused_depthwise(self.conv2d, x, self.act_name)
        y = self.scan(x.permute(0, 3, 1, 2)).to(u.dtype)  # (b y x e)
        return self.dropout(fused_linear(self.out_proj, self.norm_and_gate(y, z)))

    def norm_and_gate(self, y: Tensor, z: Tensor | None) -> Tensor:
        """out_act(out_norm(y)) * gate(z): (b y x e), z None without a gate"""
        if self.joined:
            return fused_gated_norm(self.out_norm, y, z)
        y = self.out_act(self.out_norm(y))
        if z is None:
            return y
        return y * (self.act(z) if self.gate == "act" else z)

    def scan(self, x: Tensor) -> Tensor:
        """(b e y x) -> the sum over the scan directions (b y x e)"""
        if self.scans == "cascade":
            return self._cascade(x)
        return cross_selective_scan(
            x,
            self.x_proj_weight,
            self.dt_projs_weight,
            fp32(self.dt_projs_bias),
            -torch.exp(fp32(self.A_logs)),
            fp32(self.Ds),
            self.scans,
        )

    def scan_by(self, xs: Tensor, first: int) -> Tensor:
        """xs (b k e l) with the projections of the directions first .. first + k - 1 -> (b k e l)"""
        k, e = xs.shape[1:3]
        take = slice(first, first + k)
        return directional_scan(
            xs,
            self.x_proj_weight[take],
            self.dt_projs_weight[take],
            self.dt_projs_bias[take],
            self.A_logs.unflatten(0, (4, e))[take],
            self.Ds.unflatten(0, (4, e))[take],
        )

    def _cascade(self, x: Tensor) -> Tensor:
        """Every row by itself, then every column; the reversed one is added without flipping it back, as released."""
        for first in (0, 2):
            x = F.layer_norm(x.permute(0, 2, 3, 1), (x.shape[1],))  # (b y x e), no weights
            lines = x.permute(0, 1, 3, 2) if first == 0 else x.permute(0, 2, 3, 1)  # (b lines e length)
            s = lines.flatten(0, 1)
            y = self.scan_by(bidirectional_scan(s), first).sum(1).unflatten(0, lines.shape[:2])
            x = y.permute(0, 2, 1, 3) if first == 0 else y.permute(0, 2, 3, 1)  # (b e y x)
        return x.permute(0, 2, 3, 1)


class HeadSS2D(SS2D):
    """SS2D with Mamba-2's recurrence: dt_rank heads per direction with a decay each, no rank below the time step.

    y_t = S_t C_t + D x_t,   S_t = exp(delta_t A_h) S_{t-1} + delta_t x_t B_t^T,   A (k h), D (k h p), h p = e
    """

    def make_scan_parameters(self) -> None:
        e, n, h = self.d_inner, self.d_state, self.dt_rank
        if self.scans == "cascade" or e % h:
            raise ValueError(
                f"HeadSS2D needs scans other than 'cascade' (got {self.scans!r}) and dt_rank heads that "
                f"divide its {e} channels (got {h})"
            )
        self.x_proj_weight = nn.Parameter(torch.empty(4, h + 2 * n, e))
        self.dt_projs_bias = nn.Parameter(torch.empty(4, h))
        self.A_logs = nn.Parameter(torch.empty(4, h))
        self.Ds = nn.Parameter(torch.empty(4, h, e // h))

    def reset_parameters(self) -> None:
        """A in 1 .. 16, time steps in 1e-3 .. 0.1 tokens ("mamba"), or A_logs and dt bias by "normal" and "zero"."""
        with torch.no_grad():
            self.x_proj_weight.uniform_(-(self.d_inner**-0.5), self.d_inner**-0.5)
            self.Ds.fill_(1.0)
            if self.ssm_init == "mamba":
                dt_bias_(self.dt_projs_bias)
                self.A_logs.uniform_(1, 16).log_()
            elif self.ssm_init == "normal":
                self.dt_projs_bias.normal_(std=0.1)
                self.A_logs.normal_()
            else:
                self.dt_projs_bias.uniform_(0, 0.1)
                self.A_logs.zero_()
        for linear in (self.in_proj, self.out_proj):
            nn.init.trunc_normal_(linear.weight, std=0.02)

    def scan(self, x: Tensor) -> Tensor:
        k, h, n = 4, self.dt_rank, self.d_state
        xs = cross_scan(x, self.scans)  # (b k e l)
        dt, B, C = torch.matmul(self.x_proj_weight, xs).split([h, n, n], dim=2)
        heads = xs.reshape(len(xs), k * h, -1, xs.shape[-1]).permute(0, 3, 1, 2)  # (b l kh p)
        y = mamba_chunk_scan_combined(
            heads,
            dt.flatten(1, 2).transpose(1, 2),
            -torch.exp(fp32(self.A_logs)).flatten(),
            B.permute(0, 3, 1, 2),
            C.permute(0, 3, 1, 2),
            64,
            D=fp32(self.Ds).flatten(0, 1),
            dt_bias=fp32(self.dt_projs_bias).flatten(),
            dt_softplus=True,
        )
        ys = y.permute(0, 2, 3, 1).reshape(xs.shape)
        y = cross_merge(ys.unflatten(-1, x.shape[2:]), self.scans)  # (b e l)
        return y.transpose(1, 2).unflatten(1, x.shape[2:])
