"""SD-SSM (Terzic et al., AAAI 2025, arXiv 2412.19350): one selective dense state-space layer that emulates automata.

    tokens -> SDSSM mixer -> LayerNorm -> Linear                            (readout "linear")
    tokens -> SDSSM mixer -> LayerNorm -> Linear, ReLU, Linear              (readout "nonlinear")

What differs from other selective SSMs: the transition is a full matrix, so that transitions need not commute; no
step size, no gate, no skip, no residual, no second layer. Inputs are one-hot: token ids, or vectors of that width.

Source: IBM/selective-dense-state-space-model @5bdc7f7 (Apache-2.0), models/SDSSM.py and SDSSM_nonlinear.py; parameter
names are theirs. Not taken over: `embed_size`, which the official model ignores.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ssmzoo.layers.mixers.sd_ssm import SDSSM, SDSSMState
from ssmzoo.layers.state import ModelOutput, refuse_prefix


class SDSSMModel(nn.Module):
    """One SD-SSM layer with its readout; logits at every position.

    input_size      token ids, or the width of float inputs
    num_classes     classes; None: input_size
    state_size      n of the recurrence; an automaton of q states needs about q
    num_transition_matrices, p_norm, init, init_noise   see SDSSM
    mlp_size        hidden width of a nonlinear readout; None: a linear readout
    state_penalty   weight of the excess of the mean squared state over `state_cap` as an auxiliary loss: a dense
                    transition may grow a direction that the LayerNorm hides until it overflows; 0: off, as published

    forward(input_ids (b l) or x (b l input_size), state) -> ModelOutput
    """

    def __init__(
        self,
        input_size: int = 3,
        num_classes: int | None = None,
        state_size: int = 64,
        num_transition_matrices: int = 8,
        p_norm: float = 1.2,
        mlp_size: int | None = None,
        init: str = "xavier",
        init_noise: float = 0.05,
        state_penalty: float = 0.0,
        state_cap: float = 0.5,
    ):
        super().__init__()
        num_classes = input_size if num_classes is None else num_classes
        for name, value in (("num_classes", num_classes), ("mlp_size", 1 if mlp_size is None else mlp_size)):
            if value < 1:
                raise ValueError(f"{name} = {value}; it must be at least 1")
        if state_penalty < 0 or state_cap < 0:
            raise ValueError(f"state_penalty = {state_penalty} and state_cap = {state_cap} must not be negative")
        self.input_size, self.num_classes, self.state_size = input_size, num_classes, state_size
        self.state_penalty, self.state_cap = state_penalty, state_cap
        self.block = SDSSM(input_size, state_size, num_transition_matrices, p_norm, init, init_noise)
        self.norm = nn.LayerNorm(state_size)
        if mlp_size is None:
            self.readout = nn.Linear(state_size, num_classes)
        else:
            self.readout = nn.Sequential(nn.Linear(state_size, mlp_size), nn.ReLU(), nn.Linear(mlp_size, num_classes))

    def forward(
        self,
        input_ids: Tensor,
        state: SDSSMState | None = None,
        *,
        mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
        prefix: int | Tensor | None = None,
    ) -> ModelOutput:
        refuse_prefix(prefix, type(self).__name__)
        h, state = self.block(input_ids, state, mask=mask, seq_idx=seq_idx)  # (b l n)
        aux = {}
        if self.training and self.state_penalty:
            excess = (h.square().mean(-1) - self.state_cap).relu()  # (b l)
            excess = excess.mean() if mask is None else (excess * mask).sum() / mask.sum().clamp(min=1)
            aux["state_loss"] = self.state_penalty * excess
        return ModelOutput(self.readout(self.norm(h)), state, aux)

    def allocate_state(self, batch_size: int, device=None, dtype=None) -> SDSSMState:
        """The state before the first token."""
        dtype = torch.float32 if dtype is None else dtype
        return SDSSMState(torch.zeros(batch_size, self.state_size, device=device, dtype=dtype))

    @torch.no_grad()
    def transitions(self) -> tuple[Tensor, Tensor]:
        """T (input_size n n) and W_b x (input_size n) of every token: h <- T[token] h + x[token]."""
        from ssmzoo.ops.dense_scan import mix_transitions

        weights, inputs = self.block.symbols()
        return mix_transitions(self.block.A_dict, weights, self.block.p_norm), inputs

    def no_weight_decay(self) -> set[str]:
        """The scale of A_dict has no effect: its columns are normalised."""
        return {"block.A_dict"}


def append_query_token(x: Tensor) -> Tensor:
    """One-hot (b l e) -> (b l+1 e+1): a new last column, set only in one more row at the end, where the answer is
    read."""
    x = nn.functional.pad(x, (0, 1, 0, 1))
    x[:, -1, -1] = 1
    return x
