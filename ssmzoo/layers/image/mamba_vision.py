"""MambaVision's token mixer: a scan on one half of the channels, a convolution on the other, no gate.

    x, z = split(W_in u);   x = SiLU(conv_x x),  z = SiLU(conv_z z)        convolutions with as much after as before
    [dt_r, B, C] = W_x x;   dt = softplus(W_dt dt_r + 2 b_dt);   y = scan(x)        out = W_out [y, z]

The halves are concatenated. b_dt counts twice, as released (in the projection and in the scan). Not causal.

b batch, l tokens, d width, e = expand d, half of it for x and half for z, n state size, r rank of the time step.
Source: Hatamizadeh & Kautz 2024 (arXiv 2407.08083).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssmzoo.layers.init import A_log_s4d_real_, MambaInit, time_step_rank
from ssmzoo.layers.norm import fp32
from ssmzoo.layers.plain import is_plain
from ssmzoo.ops import selective_scan_fn


class MambaVisionMixer(nn.Module):
    """(b l d) -> (b l d).

    d_model, d_state, d_conv, expand, dt_rank   d, n, taps, e / d, r or "auto" = ceil(d / 16)
    init        fields of ssmzoo.layers.init.MambaInit, by name
    bias        of the input and output projections
    """

    Options = MambaInit

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | str = "auto",
        bias: bool = False,
        **init,
    ):
        super().__init__()
        e = self.d_inner = int(expand * d_model)
        if e % 2 or e < 2:
            raise ValueError(
                f"expand * d_model = {e} must be even: half of it is scanned; got d_model={d_model}, expand={expand}"
            )
        half, r = e // 2, time_step_rank(dt_rank, d_model)
        self.dt_rank, self.d_state, self.init = r, d_state, MambaInit(**init)
        self.in_proj = nn.Linear(d_model, e, bias=bias)
        self.conv1d_x = nn.Conv1d(half, half, d_conv, groups=half, bias=False, padding="same")
        self.conv1d_z = nn.Conv1d(half, half, d_conv, groups=half, bias=False, padding="same")
        self.x_proj = nn.Linear(half, r + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(r, half)
        self.A_log = nn.Parameter(torch.empty(half, d_state))
        self.D = nn.Parameter(torch.empty(half))
        self.out_proj = nn.Linear(e, d_model, bias=bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As in Mamba; the rest keeps torch's default."""
        self.init.time_step_(self.dt_proj)
        A_log_s4d_real_(self.A_log)
        nn.init.ones_(self.D)

    def forward(self, u: Tensor) -> Tensor:
        x, z = self.in_proj(u).transpose(1, 2).chunk(2, dim=1)  # (b e/2 l)
        x, z = F.silu(self.conv1d_x(x)), F.silu(self.conv1d_z(z))
        x = self.arrange(x)
        dt, B, C = self.steps(x)
        bias = self.dt_proj.bias if is_plain(self.dt_proj) else self.dt_proj(x.new_zeros(1, self.dt_rank))[0]
        y = selective_scan_fn(
            x,
            dt,
            -torch.exp(fp32(self.A_log)),
            B,
            C,
            fp32(self.D),
            delta_bias=fp32(bias),
            delta_softplus=True,
        )
        return self.out_proj(torch.cat([y, z], dim=1).transpose(1, 2))

    def arrange(self, x: Tensor) -> Tensor:
        """The tokens of x (b e/2 l) in the order in which they are scanned; a subclass may sort them."""
        return x

    def steps(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (b e/2 l) -> dt before the scan's own bias (b e/2 l), B and C (b n l)"""
        n = self.d_state
        dt, B, C = self.x_proj(x.transpose(1, 2)).split([self.dt_rank, n, n], dim=-1)
        return self.dt_proj(dt).transpose(1, 2), B.transpose(1, 2), C.transpose(1, 2)
