"""MambaVision's mixer of one sequence, and token reordering by learned importance in front of its scan.

    x, z = split(W_in u);   x = SiLU(conv_x x),  z = SiLU(conv_z z)        convolutions with as much after as before
    [dt_r, B, C] = W_x x;   dt = softplus(W_dt dt_r + 2 b_dt);   y = scan(x)        out = W_out [y, z]
    reorder:  s = k^T (W_dt dt_r + b_dt),  P = SoftSort(-s),  x <- P x before the projections of the scan: the most
              important token comes last and is never sorted back; z stays in place

No gate: the halves are concatenated. b_dt counts twice, as released (in the projection and in the scan).
Not causal, and P is (l l): for windows of images, not for text.

b batch, l tokens, d width, e = expand d, half of it for x and half for z, n state size, r rank of the time step.
Source: Hatamizadeh & Kautz 2024 (arXiv 2407.08083) for the mixer; Vo et al. 2025 (arXiv 2410.03292) for the reordering.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssmzoo.layers.init import A_log_s4d_real_, dt_bias_
from ssmzoo.layers.norm import fp32
from ssmzoo.layers.soft_sort import SoftSort
from ssmzoo.ops import mix_tokens, selective_scan_fn


class MambaVisionMixer(nn.Module):
    """(b l d) -> (b l d).

    d_model, d_state, d_conv, expand, dt_rank   d, n, taps, e / d, r or "auto" = ceil(d / 16)
    dt_min, dt_max, dt_init_floor, dt_init, dt_scale   as in ssmzoo.layers.mixers.mamba.Mamba
    bias        of the input and output projections
    reorder     sort the tokens softly by importance before the scan; tau, hard: see `SoftSort`
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        bias: bool = False,
        reorder: bool = False,
        tau: float = 1.0,
        hard: bool = False,
    ):
        super().__init__()
        e = self.d_inner = int(expand * d_model)
        if e % 2 or e < 2:
            raise ValueError(
                f"expand * d_model = {e} must be even: half of it is scanned; got d_model={d_model}, expand={expand}"
            )
        if dt_init not in ("random", "constant"):
            raise ValueError(f"dt_init must be 'random' or 'constant', got {dt_init!r}")
        half, r = e // 2, math.ceil(d_model / 16) if dt_rank == "auto" else int(dt_rank)
        self.dt_rank, self.d_state = r, d_state
        self.dt_start, self.dt_init, self.dt_scale = (dt_min, dt_max, dt_init_floor), dt_init, dt_scale
        self.in_proj = nn.Linear(d_model, e, bias=bias)
        self.conv1d_x = nn.Conv1d(half, half, d_conv, groups=half, bias=False, padding="same")
        self.conv1d_z = nn.Conv1d(half, half, d_conv, groups=half, bias=False, padding="same")
        self.x_proj = nn.Linear(half, r + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(r, half)
        self.A_log = nn.Parameter(torch.empty(half, d_state))
        self.D = nn.Parameter(torch.empty(half))
        self.out_proj = nn.Linear(e, d_model, bias=bias)
        self.importance = nn.Linear(half, 1, bias=False) if reorder else None
        self.sort = SoftSort(tau, hard) if reorder else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As in Mamba; the rest keeps torch's default."""
        s = self.dt_scale * self.dt_rank**-0.5
        nn.init.uniform_(self.dt_proj.weight, s if self.dt_init == "constant" else -s, s)
        dt_bias_(self.dt_proj.bias, *self.dt_start)
        A_log_s4d_real_(self.A_log)
        nn.init.ones_(self.D)

    def forward(self, u: Tensor) -> Tensor:
        x, z = self.in_proj(u).transpose(1, 2).chunk(2, dim=1)  # (b e/2 l)
        x, z = F.silu(self.conv1d_x(x)), F.silu(self.conv1d_z(z))
        if self.sort is not None:
            x = self.reorder(x)
        dt, B, C = self.steps(x)
        y = selective_scan_fn(
            x,
            dt,
            -torch.exp(fp32(self.A_log)),
            B,
            C,
            fp32(self.D),
            delta_bias=fp32(self.dt_proj.bias),
            delta_softplus=True,
        )
        return self.out_proj(torch.cat([y, z], dim=1).transpose(1, 2))

    def steps(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (b e/2 l) -> dt before the scan's own bias (b e/2 l), B and C (b n l)"""
        n = self.d_state
        dt, B, C = self.x_proj(x.transpose(1, 2)).split([self.dt_rank, n, n], dim=-1)
        return self.dt_proj(dt).transpose(1, 2), B.transpose(1, 2), C.transpose(1, 2)

    def reorder(self, x: Tensor) -> Tensor:
        """Tokens of x (b e/2 l), the most important last."""
        scores = self.importance(self.steps(x)[0].transpose(1, 2)).squeeze(-1)  # (b l)
        return mix_tokens(x, self.sort(-scores))
