"""The residual container of the Mamba family: blocks, the stack of them, and a gated MLP.

    r <- r + h;  h = Mixer(Norm(r));      with an MLP: r <- r + h;  h = MLP(Norm2(r))

The residual stream r travels beside the last sublayer's output h and is added at the next norm: mathematically
x + Mixer(Norm(x)), but r can stay in fp32 while the sublayers compute in lower precision.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ssmzoo.layers.norm import LayerNorm, RMSNorm
from ssmzoo.layers.state import Padding


class GatedMLP(nn.Module):
    """(... d) -> (... d): W2 (a SiLU(g)), [a, g] = W1 x; the hidden width is rounded up to a multiple; no biases."""

    def __init__(self, d_model: int, hidden: int, multiple_of: int = 128):
        super().__init__()
        hidden = -(-hidden // multiple_of) * multiple_of
        self.fc1 = nn.Linear(d_model, 2 * hidden, bias=False)
        self.fc2 = nn.Linear(hidden, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        a, g = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(a * F.silu(g))


class Block(nn.Module):
    """One step of the container around any causal mixer. h, residual (b l d); residual None at the bottom."""

    def __init__(
        self,
        mixer: nn.Module,
        norm: nn.Module,
        mlp: nn.Module | None = None,
        norm2: nn.Module | None = None,
        residual_in_fp32: bool = True,
    ):
        super().__init__()
        self.mixer, self.norm, self.mlp, self.norm2 = mixer, norm, mlp, norm2
        self.residual_in_fp32 = residual_in_fp32

    def forward(
        self,
        h: Tensor,
        residual: Tensor | None,
        state: Any = None,
        *,
        mask: Padding | None = None,
        seq_idx: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Any]:
        residual = self._add(h, residual)
        h, state = self.mixer(self.norm(residual), state, mask=mask, seq_idx=seq_idx)
        if self.mlp is not None:
            residual = self._add(h, residual)
            h = self.mlp(self.norm2(residual))
        return h, residual, state

    def _add(self, h: Tensor, residual: Tensor | None) -> Tensor:
        residual = h if residual is None else residual + h
        half = residual.dtype in (torch.float16, torch.bfloat16)
        return residual.float() if half and self.residual_in_fp32 else residual


class Stack(nn.Module):
    """embedding -> blocks -> final norm. (b l) ids or (b l d) vectors -> hidden (b l d), tuple of states"""

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        mixers: Iterable[nn.Module],
        d_intermediate: int = 0,
        rms_norm: bool = True,
        norm_eps: float = 1e-5,
        residual_in_fp32: bool = True,
    ):
        super().__init__()
        norm = RMSNorm if rms_norm else LayerNorm
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.layers = nn.ModuleList(
            Block(
                mixer,
                norm(d_model, eps=norm_eps),
                GatedMLP(d_model, d_intermediate) if d_intermediate else None,
                norm(d_model, eps=norm_eps) if d_intermediate else None,
                residual_in_fp32,
            )
            for mixer in mixers
        )
        self.norm_f = norm(d_model, eps=norm_eps)
        self.grad_checkpointing = False

    def forward(
        self, x: Tensor, state: tuple | None = None, *, mask: Padding | None = None, seq_idx: Tensor | None = None
    ) -> tuple[Tensor, tuple]:
        h = x if x.is_floating_point() else self.embedding(x)
        recompute = self.grad_checkpointing and torch.is_grad_enabled()
        residual, states = None, []
        for layer, s in zip(self.layers, state or (None,) * len(self.layers), strict=True):
            if recompute:
                h, residual, s = checkpoint(layer, h, residual, s, mask=mask, seq_idx=seq_idx, use_reentrant=False)
            else:
                h, residual, s = layer(h, residual, s, mask=mask, seq_idx=seq_idx)
            states.append(s)
        return self.norm_f(h if residual is None else residual + h), tuple(states)
