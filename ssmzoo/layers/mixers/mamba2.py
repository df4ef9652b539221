"""The Mamba-2 mixer: one decay per head, everything projected at once, the scan as chunked matrix products.

    [z0, x0, z, xBC, dt] = W_in u                  d_mlp, d_mlp, d_ssm, d_ssm + 2gn, h; d_mlp = d_inner - d_ssm
    x, B, C = split(SiLU(causal depthwise conv_k(xBC)))
    dt = clamp(softplus(dt + dt_bias), dt_limit)
    S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T     A = -exp(A_log) (h), S (h p n), head i uses group i // (h / g)
    y_t = S_t C_t + D x_t
    y = GatedRMSNorm(y, z), or y SiLU(z) without the norm
    out = W_out [SiLU(z0) x0, y]

b batch, l length, d d_model, h heads of p channels, n state size, g groups sharing B and C, k taps.
The clamp to dt_limit holds in single steps too; the released implementations forget it there (`clamp_steps`).
Source: Dao & Gu 2024 (arXiv 2405.21060), section 7; parameter names of state-spaces/mamba (Apache-2.0).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssmzoo.layers.init import A_log_uniform_, dt_bias_
from ssmzoo.layers.mixers.short_conv import short_conv
from ssmzoo.layers.norm import GatedRMSNorm, fp32
from ssmzoo.layers.plain import is_plain
from ssmzoo.layers.program import Builder, convolution, matrix, special_of
from ssmzoo.layers.state import Padding, call_aligned, is_step, itemsize
from ssmzoo.ops import mamba2_step, mamba_chunk_scan_combined, ssd_state_update
from ssmzoo.ops.stack_step import Mamba2Layer
from ssmzoo.ops.token_step import Mamba2Weights, Register


class Mamba2State(NamedTuple):
    conv: Tensor  # (b d_ssm+2gn k) the last k inputs of the convolution, oldest first
    ssm: Tensor  # (b h p n) fp32


@dataclass
class Mamba2Options:
    """What is rarely changed.

    norm_before_gate, norm_groups, norm_eps      the output norm: in which order, over how many groups (default g)
    D_has_hdim           a skip weight per channel instead of per head
    dt_limit             the time step is clamped to this range, in tokens
    clamp_steps          False repeats the released decoding, whose single-token steps forget dt_limit
    dt_min, dt_max, dt_init_floor, A_init_range, conv_init   initial values, see `Mamba2.reset_parameters`
    learnable_init_states              S_0 is a parameter (zero at first) instead of zero; not with packed documents
    """

    norm_before_gate: bool = False
    norm_groups: int | None = None
    norm_eps: float = 1e-5
    D_has_hdim: bool = False
    dt_limit: Sequence[float] = (0.0, math.inf)
    clamp_steps: bool = True
    dt_min: float = 0.001
    dt_max: float = 0.1
    dt_init_floor: float = 1e-4
    A_init_range: Sequence[float] = (1, 16)
    conv_init: float | None = None
    learnable_init_states: bool = False


class Mamba2(nn.Module):
    """Causal mixer (b l d) -> (b l d).

    d_model, d_state, d_conv, expand   d, n, k and d_inner / d
    headdim, ngroups     p and g
    d_ssm                channels that go through the SSM (default all d_inner); the rest is a gated MLP
    rmsnorm              whether there is an output norm
    bias, conv_bias      biases of the projections and of the convolution
    chunk_size           tokens per chunk of the scan; changes the speed, not the result
    options              fields of Mamba2Options, by name
    """

    Options = Mamba2Options

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        expand: float = 2,
        headdim: int = 64,
        ngroups: int = 1,
        d_ssm: int | None = None,
        rmsnorm: bool = True,
        bias: bool = False,
        conv_bias: bool = True,
        chunk_size: int = 256,
        **options,
    ):
        super().__init__()
        o = self.options = Mamba2Options(**options)
        self.d_model, self.d_state, self.d_conv, self.d_inner = d_model, d_state, d_conv, int(expand * d_model)
        self.d_ssm = self.d_inner if d_ssm is None else d_ssm
        self.headdim, self.ngroups, self.chunk_size = headdim, ngroups, chunk_size
        if min(d_model, d_state, d_conv, headdim, ngroups, chunk_size) < 1 or not 0 < self.d_ssm <= self.d_inner:
            raise ValueError(
                f"Mamba2 needs positive sizes and 0 < d_ssm <= expand * d_model, got d_model={d_model}, "
                f"d_state={d_state}, d_conv={d_conv}, headdim={headdim}, ngroups={ngroups}, "
                f"d_ssm={self.d_ssm}, chunk_size={chunk_size}"
            )
        if self.d_ssm % headdim:
            raise ValueError(f"headdim must divide the {self.d_ssm} SSM channels, got {headdim}")
        self.nheads = self.d_ssm // headdim
        if self.nheads % ngroups:
            raise ValueError(f"ngroups must divide the {self.nheads} heads, got {ngroups}")
        self.d_mlp = self.d_inner - self.d_ssm
        self.dt_limit = tuple(float(v) for v in o.dt_limit)
        channels = self.d_ssm + 2 * ngroups * d_state
        self.widths = [self.d_mlp, self.d_mlp, self.d_ssm, channels, self.nheads]
        self.in_proj = nn.Linear(d_model, sum(self.widths), bias=bias)
        self.conv1d = nn.Conv1d(channels, channels, d_conv, groups=channels, bias=conv_bias)
        self.dt_bias = nn.Parameter(torch.empty(self.nheads))
        self.A_log = nn.Parameter(torch.empty(self.nheads))
        self.D = nn.Parameter(torch.empty(self.d_ssm if o.D_has_hdim else self.nheads))
        states = nn.Parameter(torch.zeros(self.nheads, headdim, d_state)) if o.learnable_init_states else None
        self.register_parameter("init_states", states)
        group = self.d_ssm // (o.norm_groups or ngroups)
        self.norm = GatedRMSNorm(self.d_ssm, o.norm_eps, group, o.norm_before_gate) if rmsnorm else None
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """dt log-uniform in [dt_min, dt_max], -A ~ U(A_init_range), D = 1; conv weights ~ U(-c, c) for conv_init c."""
        o = self.options
        dt_bias_(self.dt_bias, o.dt_min, o.dt_max, o.dt_init_floor)
        A_log_uniform_(self.A_log, *o.A_init_range)
        nn.init.ones_(self.D)
        if o.conv_init is not None:
            nn.init.uniform_(self.conv1d.weight, -o.conv_init, o.conv_init)

    def forward(
        self,
        x: Tensor,
        state: Mamba2State | None = None,
        *,
        mask: Tensor | Padding | None = None,
        seq_idx: Tensor | None = None,
    ) -> tuple[Tensor, Mamba2State]:
        if isinstance(mask, Tensor):
            return call_aligned(self.forward, x, state, mask, seq_idx)
        if is_step(x, state, mask, seq_idx) and self._fused():
            return self._step(x, state)
        z0, x0, z, xBC, dt = self.in_proj(x).split(self.widths, dim=-1)
        dt = F.softplus(fp32(dt) + fp32(self.dt_bias))  # (b l h)
        if self.options.clamp_steps or state is None or x.shape[1] > 1:
            dt = dt.clamp(*self.dt_limit)
        if is_step(x, state, mask, seq_idx):
            y, state = self._mix_one(xBC, dt, state)
        else:
            y, state = self._mix(xBC, dt, state, mask, seq_idx)
        y = self.norm(y, z) if self.norm is not None else y * F.silu(z)
        if self.d_mlp:
            y = torch.cat([F.silu(z0) * x0, y], dim=-1)
        if mask is not None:
            y = y * mask.mask[..., None]
        return self.out_proj(y), state

    def _mix(self, xBC: Tensor, dt: Tensor, state, padding, seq_idx) -> tuple[Tensor, Mamba2State]:
        """Convolution and scan of whole sequences. xBC (b l d_ssm+2gn), dt (b l h) -> (b l d_ssm)"""
        past, S = state if state is not None else (None, self._start(xBC, seq_idx))
        xBC, window = short_conv(self.conv1d, xBC.transpose(1, 2), past, self.d_conv, padding, seq_idx)
        if padding is not None:
            dt = dt * padding.mask[..., None]  # dt = 0: no decay, no input
        x, B, C = self._split(xBC.transpose(1, 2))
        y, S = mamba_chunk_scan_combined(
            x,
            dt,
            self.A,
            B,
            C,
            self.chunk_size,
            D=self._skip(),
            initial_states=S,
            seq_idx=seq_idx,
            return_final_states=True,
        )
        return y.flatten(2), Mamba2State(window, S)

    def _mix_one(self, xBC: Tensor, dt: Tensor, state: Mamba2State) -> tuple[Tensor, Mamba2State]:
        """`_mix` for one token: the recurrence itself. xBC (b 1 d_ssm+2gn), dt (b 1 h)"""
        S = state.ssm.clone()  # the caller keeps the state it passed in
        xBC, conv = short_conv(self.conv1d, xBC.transpose(1, 2), state.conv, self.d_conv)
        x, B, C = self._split(xBC[..., 0])
        y = ssd_state_update(S, x, dt[:, 0], self.A, B, C, self._skip())
        return y.flatten(1)[:, None], Mamba2State(conv, S)

    def _fused(self) -> bool:
        """Whether one token may go through the operator that takes the weights of the inner modules."""
        return is_plain(self.in_proj, self.out_proj) and self._simple()

    def _simple(self, conv: bool = False) -> bool:
        """The same but for the projections; conv: the convolution is known."""
        if self.d_mlp or not (conv or is_plain(self.conv1d)):
            return False
        norm = self.norm
        if norm is None:
            return True
        return is_plain(norm, among={GatedRMSNorm}) and norm.group_size == self.d_ssm and not norm.norm_before_gate

    def layer(self, norm: nn.Module) -> Mamba2Layer | None:
        """This mixer behind a norm as `stack_step` takes it; None if a module is to be called."""
        i, conv, o, own = self.in_proj, self.conv1d, self.out_proj, self.norm
        matrices = matrix(i), matrix(o)
        if not is_plain(self, among={Mamba2}) or any(m is None for m in matrices) or not self._simple():
            return None
        weight, eps = (None, 0.0) if own is None else (own.weight, own.eps)
        middle = conv.weight, conv.bias, self.dt_bias, self.A_log, self.D, weight
        last = self.ngroups, eps, *(self.dt_limit if self.options.clamp_steps else (0.0, math.inf))
        return Mamba2Layer(norm.weight, norm.eps, matrices[0], *middle, matrices[1], i.bias, o.bias, *last)

    def program(self, p: Builder, u: Register) -> Register:
        i, conv, o, own = self.in_proj, self.conv1d, self.out_proj, self.norm
        matrices, taps = (matrix(i, eight=True), matrix(o, rotated=True, eight=True)), convolution(conv)
        p.need(all(m is not None for m in (*matrices, taps)), self._simple(taps is not None))
        weight, eps = (None, 0.0) if own is None else (own.weight, own.eps)
        middle = taps, self.dt_bias, self.A_log, self.D, weight
        last = self.ngroups, eps, *(self.dt_limit if self.options.clamp_steps else (0.0, math.inf))
        heads = self.nheads, self.headdim, self.d_state
        states = p.state(self.widths[3], self.d_conv), p.state(*heads)
        layer = Mamba2Weights(matrices[0], *middle, matrices[1], i.bias, o.bias, *last, heads, special_of(o))
        return p.emit("mamba2", p.reg(o.out_features), u, numbers=(0, 0), states=states, layer=layer)

    def _step(self, x: Tensor, state: Mamba2State) -> tuple[Tensor, Mamba2State]:
        """One token (b 1 d), without gradients."""
        weight, eps = (None, 0.0) if self.norm is None else (self.norm.weight, self.norm.eps)
        out, conv, S = mamba2_step(
            x[:, 0],
            *state,
            self.in_proj.weight,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            self.dt_bias,
            self.A_log,
            self.D,
            weight,
            self.out_proj.weight,
            self.in_proj.bias,
            self.out_proj.bias,
            self.ngroups,
            eps,
            *(self.dt_limit if self.options.clamp_steps else (0.0, math.inf)),
        )
        return out[:, None], Mamba2State(conv, S)

    def state_bytes(self, length: int) -> int:
        size, wide = itemsize(self)
        return self.widths[3] * self.d_conv * size + self.d_ssm * self.d_state * wide

    @property
    def A(self) -> Tensor:
        """(h) negative, fp32: in half precision slow decays would round to none."""
        return -torch.exp(fp32(self.A_log))

    def _skip(self) -> Tensor:
        """D (h), or (h p) with a weight per channel."""
        return fp32(self.D).reshape(self.nheads, self.headdim) if self.options.D_has_hdim else fp32(self.D)

    def _split(self, xBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(... d_ssm+2gn) -> x (... h p), B (... g n), C (... g n)"""
        gn = self.ngroups * self.d_state
        x, B, C = xBC.split([self.d_ssm, gn, gn], dim=-1)
        groups = (self.ngroups, self.d_state)
        return x.unflatten(-1, (self.nheads, self.headdim)), B.unflatten(-1, groups), C.unflatten(-1, groups)

    def _start(self, x: Tensor, seq_idx: Tensor | None) -> Tensor | None:
        """S_0 (b h p n) of new sequences; None stands for zero."""
        if self.init_states is None:
            return None
        if seq_idx is not None:
            raise ValueError(
                "seq_idx cannot be used with learnable_init_states: later documents of a row would start "
                "at zero; pass the documents as separate rows"
            )
        return fp32(self.init_states).expand(x.shape[0], -1, -1, -1)
