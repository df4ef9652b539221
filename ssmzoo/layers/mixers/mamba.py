"""The Mamba-1 mixer: short convolution, selective scan, gate; with the parameter names of its checkpoints.

    x, z = split(W_in u)                           x, z (e) each
    x = SiLU(causal depthwise conv_k(x))
    dt_r, B, C = split(W_x x)                      r, n, n
    dt = softplus(W_dt dt_r + b_dt)
    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t       A = -exp(A_log), h (e n)
    y_t = <h_t, C_t> + D x_t,   out = W_out (y SiLU(z))

b batch, l length, d d_model, e inner width, n state size, r rank of the time step, k taps.
Source: Gu & Dao 2023 (arXiv 2312.00752), section 3; parameter names of state-spaces/mamba (Apache-2.0).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssmzoo.layers.init import A_log_s4d_real_, MambaInit, time_step_rank
from ssmzoo.layers.mixers.short_conv import short_conv
from ssmzoo.layers.norm import fp32
from ssmzoo.layers.plain import is_plain
from ssmzoo.layers.program import Builder, convolution, matrix, special_of
from ssmzoo.layers.state import Padding, call_aligned, is_step, itemsize
from ssmzoo.ops import mamba_step, selective_scan_fn
from ssmzoo.ops.stack_step import MambaLayer
from ssmzoo.ops.token_step import MambaWeights, Register

NO_STEP = -1e4  # before the softplus: dt = 0 exactly, so that padding neither decays nor feeds the state


class MambaState(NamedTuple):
    conv: Tensor  # (b e k) the last k inputs of the convolution, oldest first
    ssm: Tensor  # (b e n) fp32


class Mamba(nn.Module):
    """Causal mixer (b l d) -> (b l d).

    d_model, d_state, d_conv, expand   d, n, k and e / d; e = int(expand d)
    dt_rank              r, or "auto" = ceil(d / 16)
    conv_bias, bias      biases of the convolution and of the input and output projections
    in_proj, out_proj    modules to use instead of the linear projections (d -> 2e, x before z; e -> d)
    init                 fields of MambaInit, by name

    A layer whose projections return more than a tensor (experts and their losses) subclasses, passes its own modules
    as in_proj and out_proj, and writes its own three-line forward around `mix`.
    """

    Options = MambaInit

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | str = "auto",
        conv_bias: bool = True,
        bias: bool = False,
        in_proj: nn.Module | None = None,
        out_proj: nn.Module | None = None,
        **init,
    ):
        super().__init__()
        self.d_model, self.d_state, self.d_conv, self.d_inner = d_model, d_state, d_conv, int(expand * d_model)
        if min(d_model, d_state, d_conv, self.d_inner) < 1:
            raise ValueError(
                f"Mamba needs positive sizes, got d_model={d_model}, d_state={d_state}, d_conv={d_conv}, "
                f"expand={expand}"
            )
        self.dt_rank = time_step_rank(dt_rank, d_model)
        self.init, e = MambaInit(**init), self.d_inner
        self.in_proj = in_proj or nn.Linear(d_model, 2 * e, bias=bias)
        self.conv1d = nn.Conv1d(e, e, d_conv, groups=e, bias=conv_bias)
        self.x_proj = nn.Linear(e, self.dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, e)
        self.A_log = nn.Parameter(torch.empty(e, d_state))
        self.D = nn.Parameter(torch.empty(e))
        self.out_proj = out_proj or nn.Linear(e, d_model, bias=bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """W_dt and b_dt by `MambaInit`, A = -1 .. -n, D = 1; other projections and convolution by torch."""
        self.init.time_step_(self.dt_proj)
        A_log_s4d_real_(self.A_log)
        nn.init.ones_(self.D)

    def forward(
        self,
        x: Tensor,
        state: MambaState | None = None,
        *,
        mask: Tensor | Padding | None = None,
        seq_idx: Tensor | None = None,
    ) -> tuple[Tensor, MambaState]:
        if isinstance(mask, Tensor):
            return call_aligned(self.forward, x, state, mask, seq_idx)
        i, o = self.in_proj, self.out_proj
        if state is not None and is_step(x, state, mask, seq_idx) and self._fused(i, o):
            return self._step(x, state, i.weight, i.bias, o.weight, o.bias)
        x, z = i(x).chunk(2, dim=-1)
        y, state = self.mix(x, z, state, mask, seq_idx)
        return o(y), state

    def mix(
        self,
        x: Tensor,
        z: Tensor,
        state: MambaState | None = None,
        padding: Padding | None = None,
        seq_idx: Tensor | None = None,
    ) -> tuple[Tensor, MambaState]:
        """What stands between the projections. x, z (b l e) -> y (b l e), gated, zero in padding slots; state."""
        if state is not None and is_step(x, state, padding, seq_idx) and self._fused():
            return self._step(torch.cat([x, z], dim=-1), state)
        past, h = state if state is not None else (None, None)
        x, window = short_conv(self.conv1d, x.transpose(1, 2), past, self.d_conv, padding, seq_idx)  # (b e l)
        dt, B, C = self.x_proj(x.transpose(1, 2)).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        wide = torch.promote_types(self.A_log.dtype, torch.float32)  # in half precision slow decays would round to none
        if is_plain(self.dt_proj) and self.dt_proj.bias is not None:  # the scan adds the bias, in fp32
            dt, dt_bias = F.linear(dt, self.dt_proj.weight), self.dt_proj.bias.to(wide)  # (b l e), (e)
        else:
            dt, dt_bias = self.dt_proj(dt), None
        if padding is not None:
            dt = dt.masked_fill(~padding.mask[..., None], NO_STEP)
        y, h = selective_scan_fn(
            x,
            dt.transpose(1, 2),
            -torch.exp(self.A_log.to(wide)),
            B.transpose(1, 2),
            C.transpose(1, 2),
            self.D.to(wide),
            z=z.transpose(1, 2),
            delta_bias=dt_bias,
            delta_softplus=True,
            return_last_state=True,
            initial_state=h,
            seq_idx=seq_idx,
        )
        y = y.transpose(1, 2)
        return (y if padding is None else y * padding.mask[..., None]), MambaState(window, h)

    def state_bytes(self, length: int) -> int:
        size, wide = itemsize(self)
        return self.d_inner * (self.d_conv * size + self.d_state * wide)

    @property
    def A(self) -> Tensor:
        """(e n) negative, fp32: in half precision slow decays would round to none."""
        return -torch.exp(fp32(self.A_log))

    def _fused(self, *projections: nn.Module) -> bool:
        """Whether one token may go through the operator that takes the weights of the inner modules."""
        x_proj, dt_proj = self.x_proj, self.dt_proj
        return is_plain(self.conv1d, x_proj, dt_proj, *projections) and x_proj.bias is None and dt_proj.bias is not None

    def layer(self, norm: nn.Module) -> MambaLayer | None:
        """This mixer behind a norm as `stack_step` takes it; None if a module is to be called."""
        i, x, dt, o = self.in_proj, self.x_proj, self.dt_proj, self.out_proj
        matrices = [matrix(m) for m in (x, dt, i, o)]
        if not is_plain(self, among={Mamba}) or not is_plain(self.conv1d) or any(m is None for m in matrices):
            return None
        if x.bias is not None or dt.bias is None:
            return None
        conv = self.conv1d
        small, large = (*matrices[:2], dt.bias, self.A_log, self.D), (matrices[2], i.bias, matrices[3], o.bias)
        return MambaLayer(norm.weight, norm.eps, conv.weight, conv.bias, *small, *large)

    def program(self, p: Builder, u: Register) -> Register:
        i, x, dt, o, conv = self.in_proj, self.x_proj, self.dt_proj, self.out_proj, self.conv1d
        matrices = [*(matrix(m, eight=True) for m in (x, dt, i)), matrix(o, rotated=True, eight=True)]
        taps = convolution(conv)
        p.need(taps is not None, all(m is not None for m in matrices), x.bias is None, dt.bias is not None)
        small, large = (*matrices[:2], dt.bias, self.A_log, self.D), (matrices[2], i.bias, matrices[3], o.bias)
        states = p.state(self.d_inner, self.d_conv), p.state(self.d_inner, self.d_state)
        layer = MambaWeights(taps, *small, *large, special_of(o))
        return p.emit("mamba", p.reg(self.d_model), u, numbers=(0, 0), states=states, layer=layer)

    def _step(self, u: Tensor, state: MambaState, *projections: Tensor | None) -> tuple[Tensor, MambaState]:
        """One token (b 1 d), or (b 1 2e) when called without the projections' weights and biases."""
        out, conv, h = mamba_step(
            u[:, 0],
            *state,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            self.x_proj.weight,
            self.dt_proj.weight,
            self.dt_proj.bias,
            self.A_log,
            self.D,
            *projections,
        )
        return out[:, None], MambaState(conv, h)
