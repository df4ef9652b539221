"""Rotary SSD: Mamba-2's recurrence alone, with one B and C per head that rotate by their positions.

    c, b, x = W_c u, W_b u, W_x u per head;   c, b rotated (RoPE);   dt = softplus(W_dt u) (h)
    S_t = exp(dt_t A) S_{t-1} + dt_t x_t b_t^T;   y_t = S_t c_t;   out = W_o concat_heads(y)

As in attention, what position s contributes to position t depends on t - s only. No skip, convolution, gate or norm.
A is the parameter itself (`a_mode="raw"`, +1 at first, as in the released model: the state grows, and long sequences
overflow) or -exp(A_log) ("neg_exp", as in its library: the state decays).

b batch, l length, d width, h heads, p width of a head and size of its state.
Source: Wonderful Matrices (arXiv 2407.16958, 2412.11834); LoserCheems/WonderfulMatrices (Apache-2.0) for names.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssmzoo.layers.norm import fp32
from ssmzoo.layers.position import document_positions, tokens_done
from ssmzoo.layers.program import Builder
from ssmzoo.layers.rope import rope_table
from ssmzoo.layers.state import Padding, call_aligned, is_step, itemsize
from ssmzoo.ops import mamba_chunk_scan_combined, ssd_state_update
from ssmzoo.ops.rotary import rotate
from ssmzoo.ops.token_step import Register
from ssmzoo.suggest import nearest

A_MODES = ("neg_exp", "raw")


class RotarySSDState(NamedTuple):
    ssm: Tensor  # (b h p p) fp32
    done: Tensor  # (b) tokens of the open document so far


class RotarySSD(nn.Module):
    """Causal mixer (b l d) -> (b l d) with a state of constant size.

    n_heads    must divide d_model into heads of even width
    a_mode     "neg_exp": A = -exp(A_log), A_log = log(1 .. h) at first; "raw": A any real number, 1 at first
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        a_mode: str = "neg_exp",
        rope_base: float = 10000.0,
        bias: bool = False,
    ):
        super().__init__()
        self.n_heads, self.d_head, self.rope_base = n_heads, head_width(d_model, n_heads), rope_base
        if a_mode not in A_MODES:
            raise ValueError(f"a_mode is {a_mode!r}{nearest(str(a_mode), A_MODES)}; choose one of {', '.join(A_MODES)}")
        self.c_proj = nn.Linear(d_model, d_model, bias=bias)
        self.b_proj = nn.Linear(d_model, d_model, bias=bias)
        self.x_proj = nn.Linear(d_model, d_model, bias=bias)
        self.dt_proj = nn.Linear(d_model, n_heads, bias=bias)
        self.out_proj = nn.Linear(d_model, d_model, bias=bias)
        self.register_parameter("A_log" if a_mode == "neg_exp" else "A", nn.Parameter(torch.empty(n_heads)))
        self.a_mode = a_mode
        self.reset_parameters()

    def reset_parameters(self) -> None:
        with torch.no_grad():
            if self.a_mode == "raw":
                self.A.fill_(1)
            else:
                self.A_log.copy_(torch.arange(1, self.n_heads + 1).log())

    def forward(
        self,
        x: Tensor,
        state: RotarySSDState | None = None,
        *,
        mask: Tensor | Padding | None = None,
        seq_idx: Tensor | None = None,
    ) -> tuple[Tensor, RotarySSDState]:
        if isinstance(mask, Tensor):
            return call_aligned(self.forward, x, state, mask, seq_idx)
        S, done = (None, None) if state is None else state
        position, _ = document_positions(*x.shape[:2], x.device, done, seq_idx)
        heads = (self.n_heads, self.d_head)
        C, B, X = (p(x).unflatten(-1, heads) for p in (self.c_proj, self.b_proj, self.x_proj))  # (b l h p)
        cos, sin = (t[:, :, None] for t in rope_table(position, self.d_head, self.rope_base, x.dtype))
        C, B = rotate(C, cos, sin), rotate(B, cos, sin)
        dt = F.softplus(fp32(self.dt_proj(x)))  # (b l h)
        if mask is not None:
            dt = dt * mask.mask[..., None]  # dt = 0: no decay, no input
        if is_step(x, state, mask, seq_idx):
            S = S.clone()  # the caller keeps the state it passed in
            y = ssd_state_update(S, X[:, 0], dt[:, 0], self.decay(), B[:, 0], C[:, 0])[:, None]
        else:
            more = dict(initial_states=S, seq_idx=seq_idx, return_final_states=True)
            y, S = mamba_chunk_scan_combined(X, dt, self.decay(), B, C, **more)
        y = y.flatten(2) if mask is None else y.flatten(2) * mask.mask[..., None]
        return self.out_proj(y), RotarySSDState(S, tokens_done(position, done, mask))

    def program(self, p: Builder, x: Register) -> Register:
        h, d, A = self.n_heads, self.d_head, self.A if self.a_mode == "raw" else self.A_log
        C, B, X, dt = (p.linear(m, x) for m in (self.c_proj, self.b_proj, self.x_proj, self.dt_proj))
        states = p.state(h, d, d), p.state(dtype=torch.int64)
        y = p.ssd(X, B, C, (h, d, d), (d,) * 3, A, states, self.a_mode, dt, (d, self.rope_base))
        return p.linear(self.out_proj, y)

    def state_bytes(self, length: int) -> int:
        return self.n_heads * self.d_head**2 * itemsize(self)[1] + 8

    def decay(self) -> Tensor:
        """A (h) per unit of time, fp32."""
        return fp32(self.A) if self.a_mode == "raw" else -torch.exp(fp32(self.A_log))


def head_width(d_model: int, n_heads: int) -> int:
    """d_model / n_heads, an even number. Raises ValueError with the nearest numbers of heads that give one."""
    if d_model < 1 or n_heads < 1 or d_model % (2 * n_heads):
        fitting = [h for h in range(1, d_model + 1) if d_model % (2 * h) == 0]
        near = ", ".join(map(str, sorted(sorted(fitting, key=lambda h: abs(h - n_heads))[:3])))
        raise ValueError(
            f"n_heads = {n_heads} does not divide d_model = {d_model} into heads of even width, which rotary positions "
            f"need; choose one of {near or 'the divisors of an even d_model'}"
        )
    return d_model // n_heads
