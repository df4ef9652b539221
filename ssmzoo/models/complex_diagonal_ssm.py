"""Complex-diagonal SSM: the baseline of SD-SSM whose transitions commute, so that only commutative automata fit.

    tokens -> embedding -> [complex diagonal mixer -> MLP] x n_layer -> logits

Inside the stack an MLP is Linear(2n, 2n), ReLU, Linear(2n, n); the last one ends in the classes, or is a single Linear.
No residual, no normalisation.

Source: Terzic et al. 2025 (arXiv 2412.19350); IBM/selective-dense-state-space-model @5bdc7f7 (Apache-2.0),
models/complex_diagonal_{no,with}_B_{linear,nonlinear_multilayer}.py. The official models read the last step only.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmzoo.layers.plain import is_plain
from ssmzoo.layers.state import ModelOutput, itemsize, refuse_prefix
from ssmzoo.ops import complex_scan
from ssmzoo.ops.eager import eager


class ComplexState(NamedTuple):
    """h (b n 2): real and imaginary part after the last real token."""

    h: Tensor


class ComplexDiagonalSSM(nn.Module):
    """Complex diagonal mixer.

        g_t = W_2 ReLU(W_1 e_t)     lambda_t = scale * (g_re + i g_im) / |g_re + i g_im|
        h_t = lambda_t * h_{t-1} + (B_re + i B_im) e_t       (without B: the first term alone, with scale = 1)
        h_0 = n unit phasors drawn once, a buffer that belongs to the checkpoint

    d_input, d_state  e and n;  use_B  whether inputs also enter additively;  scale_eigv  the scale above (with B only)
    Input (b l e) -> features concat(Re h, Im h) (b l 2n).

    Source: IBM/selective-dense-state-space-model @5bdc7f7, models/complex_diagonal_*.py.
    """

    def __init__(self, d_input: int, d_state: int, use_B: bool = True, scale_eigv: float = 1.0):
        super().__init__()
        if d_input < 1 or d_state < 1:
            raise ValueError(f"d_input = {d_input} and d_state = {d_state} must be at least 1")
        if scale_eigv <= 0:
            raise ValueError(f"scale_eigv = {scale_eigv}; it must be positive")
        self.d_state, self.scale_eigv = d_state, scale_eigv if use_B else 1.0
        self.A_generator = nn.Sequential(
            nn.Linear(d_input, 4 * d_state), nn.ReLU(), nn.Linear(4 * d_state, 2 * d_state)
        )
        self.register_buffer("init_state", torch.empty(d_state, dtype=torch.complex64))
        if use_B:
            self.B_re = nn.Parameter(torch.empty(d_state, d_input))
            self.B_im = nn.Parameter(torch.empty(d_state, d_input))
        else:
            self.B_re = self.B_im = None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        theta = 2 * math.pi * torch.rand(self.d_state, device=self.init_state.device)
        self.init_state.copy_(torch.polar(torch.ones_like(theta), theta))
        if self.B_re is not None:  # Xavier with half of the variance in each part
            bound = math.sqrt(3) / math.sqrt(sum(self.B_re.shape))
            self.B_re.uniform_(-bound, bound)
            self.B_im.uniform_(-bound, bound)

    def _apply(self, fn, recurse: bool = True):
        """`.to(dtype)` would cast the complex buffer to a real one and lose half of it: move its two parts instead."""
        phasors, self.init_state = self.init_state, None
        super()._apply(fn, recurse)
        parts = fn(torch.view_as_real(phasors))
        parts = parts if parts.dtype == torch.float64 else parts.float()  # there are no complex numbers of 16 bits
        self.init_state = torch.view_as_complex(parts.contiguous())
        return self

    def forward(
        self,
        x: Tensor,
        state: ComplexState | None = None,
        *,
        mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
        symbols: Tensor | None = None,
    ) -> tuple[Tensor, ComplexState]:
        """symbols (b l) int: x (s e) holds the input of every distinct one, whose transition is formed once."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        g = self.A_generator(x).to(dtype)
        g = torch.complex(g[..., : self.d_state], g[..., self.d_state :])  # (b l n)
        a = self.scale_eigv * (g / g.abs())
        b = torch.zeros_like(a)
        if self.B_re is not None:
            b = torch.complex(F.linear(x, self.B_re).to(dtype), F.linear(x, self.B_im).to(dtype))
        if symbols is not None:
            a, b = _rows(a, symbols), _rows(b, symbols)
        start = self.init_state.expand(a.shape[0], -1)
        h0 = start if state is None else torch.view_as_complex(state.h.contiguous())
        if mask is not None:
            a, b = torch.where(mask[..., None], a, 1.0), torch.where(mask[..., None], b, 0.0)
        if seq_idx is not None:  # a new document starts from the initial phasors
            new = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))[..., None]
            b = torch.where(new, a * start[:, None] + b, b)
            a = torch.where(new, 0.0, a)
        h = complex_scan(a, b, h0)
        last = h[:, -1] if h.shape[1] else h0
        return torch.view_as_real(h).mT.flatten(-2).to(x.dtype), ComplexState(torch.view_as_real(last))

    def state_bytes(self, length: int) -> int:
        return 2 * self.d_state * itemsize(self)[1]


def _rows(table: Tensor, symbols: Tensor) -> Tensor:
    """Rows (b l n) of a table (s n) of complex numbers."""
    pairs = F.embedding(symbols, torch.view_as_real(table).flatten(-2))
    return torch.view_as_complex(pairs.unflatten(-1, (-1, 2)))


POINTWISE = frozenset({ComplexDiagonalSSM, nn.Sequential, nn.Linear, nn.ReLU})


class ComplexDiagonalModel(nn.Module):
    """Complex-diagonal SSM with logits at every position.

    input_size   token ids, or the width of float inputs
    num_classes  classes; None: input_size
    state_size   n per layer;  embed_size  width of the embedding, None: input_size (published)
    n_layer      more than one needs use_B and the nonlinear readout
    use_B        inputs enter additively as well;  scale_eigv  modulus of the eigenvalues (no effect without B)
    readout      "nonlinear" or "linear"
    """

    def __init__(
        self,
        input_size: int = 3,
        num_classes: int | None = None,
        state_size: int = 64,
        embed_size: int | None = None,
        n_layer: int = 1,
        use_B: bool = True,
        readout: str = "nonlinear",
        scale_eigv: float = 1.0,
    ):
        super().__init__()
        if readout not in ("linear", "nonlinear"):
            raise ValueError(f"readout = {readout!r}; choose 'linear' or 'nonlinear'")
        if n_layer < 1 or (n_layer > 1 and (not use_B or readout == "linear")):
            raise ValueError(
                f"n_layer = {n_layer} with use_B = {use_B} and readout = {readout!r}: at least one "
                f"layer, and "
                f"several need use_B=True and readout='nonlinear'"
            )
        num_classes = input_size if num_classes is None else num_classes
        embed_size = input_size if embed_size is None else embed_size
        self.input_size, self.num_classes, self.state_size = input_size, num_classes, state_size
        n = state_size
        self.embedding = nn.Linear(input_size, embed_size, bias=False)
        self.blocks = nn.ModuleList(
            ComplexDiagonalSSM(embed_size if i == 0 else n, n, use_B, scale_eigv) for i in range(n_layer)
        )
        widths = [n] * (n_layer - 1) + [num_classes]
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(2 * n, 2 * n), nn.ReLU(), nn.Linear(2 * n, width))
            if readout == "nonlinear"
            else nn.Linear(2 * n, width)
            for width in widths
        )

    def forward(
        self,
        input_ids: Tensor,
        state: tuple[ComplexState, ...] | None = None,
        *,
        mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
        prefix: int | Tensor | None = None,
    ) -> ModelOutput:
        refuse_prefix(prefix, type(self).__name__)
        symbols = None
        if input_ids.is_floating_point():
            x = self.embedding(input_ids)  # (b l e)
        elif eager(input_ids) and input_ids.numel() > self.input_size and is_plain(self.embedding) and self._plain():
            x, symbols = self.embedding.weight.T, input_ids
        elif is_plain(self.embedding):
            x = F.embedding(input_ids, self.embedding.weight.T)
        else:
            x = self.embedding(
                F.one_hot(input_ids.long(), self.input_size).to(next(self.parameters(), torch.empty(0)).dtype)
            )
        states = []
        for i, (block, mlp) in enumerate(zip(self.blocks, self.mlps)):
            x, after = block(x, None if state is None else state[i], mask=mask, seq_idx=seq_idx, symbols=symbols)
            x, symbols = mlp(x), None
            states.append(after)
        return ModelOutput(x, tuple(states), {})

    def _plain(self) -> bool:
        """Whether the first block is a function of a symbol up to its recurrence."""
        return is_plain(*self.blocks[0].modules(), among=POINTWISE)

    def allocate_state(self, batch_size: int, device=None, dtype=None) -> tuple[ComplexState, ...]:
        """The state before the first token: every layer's phasors."""
        dtype = torch.float32 if dtype is None else dtype
        return tuple(
            ComplexState(torch.view_as_real(b.init_state).to(device, dtype).expand(batch_size, -1, -1).clone())
            for b in self.blocks
        )
