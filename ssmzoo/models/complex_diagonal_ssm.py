"""Complex-diagonal SSM: the baseline of SD-SSM whose transitions commute, so that only commutative automata fit.

    tokens -> embedding -> [complex diagonal mixer -> MLP] x n_layer -> logits

Inside the stack an MLP is Linear(2n, 2n), ReLU, Linear(2n, n); the last one ends in the classes, or is a single Linear.
No residual, no normalisation.

Source: Terzic et al. 2025 (arXiv 2412.19350); IBM/selective-dense-state-space-model @5bdc7f7 (Apache-2.0),
models/complex_diagonal_{no,with}_B_{linear,nonlinear_multilayer}.py. The official models read the last step only.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmzoo.layers.mixers.complex_diagonal import ComplexDiagonalSSM, ComplexState
from ssmzoo.layers.plain import is_plain
from ssmzoo.layers.state import ModelOutput, refuse_prefix


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
        if input_ids.is_floating_point():
            x = self.embedding(input_ids)  # (b l e)
        elif is_plain(self.embedding):
            x = F.embedding(input_ids, self.embedding.weight.T)
        else:
            x = self.embedding(
                F.one_hot(input_ids.long(), self.input_size).to(next(self.parameters(), torch.empty(0)).dtype)
            )
        states = []
        for i, (block, mlp) in enumerate(zip(self.blocks, self.mlps)):
            x, after = block(x, None if state is None else state[i], mask=mask, seq_idx=seq_idx)
            x = mlp(x)
            states.append(after)
        return ModelOutput(x, tuple(states), {})

    def allocate_state(self, batch_size: int, device=None, dtype=None) -> tuple[ComplexState, ...]:
        """The state before the first token: every layer's phasors."""
        dtype = torch.float32 if dtype is None else dtype
        return tuple(
            ComplexState(torch.view_as_real(b.init_state).to(device, dtype).expand(batch_size, -1, -1).clone())
            for b in self.blocks
        )
