"""SD-SSM (Terzic et al., AAAI 2025, arXiv 2412.19350): one selective dense state-space layer that emulates automata.

    tokens -> SDSSM mixer -> LayerNorm -> Linear                            (readout "linear")
    tokens -> SDSSM mixer -> LayerNorm -> Linear, ReLU, Linear              (readout "nonlinear")

What differs from other selective SSMs: the transition is a full matrix, so that transitions need not commute; no
step size, no gate, no skip, no residual, no second layer. Inputs are one-hot: token ids, or vectors of that width.

Source: IBM/selective-dense-state-space-model @5bdc7f7 (Apache-2.0), models/SDSSM.py and SDSSM_nonlinear.py; parameter
names are theirs. Not taken over: `embed_size`, which the official model ignores.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmzoo.layers.plain import is_plain
from ssmzoo.layers.state import ModelOutput, itemsize, refuse_prefix
from ssmzoo.ops import dense_scan


class SDSSMState(NamedTuple):
    """h (b n): the state after the last real token."""

    h: Tensor


class SDSSM(nn.Module):
    """Selective dense state-space mixer.

        s_t = softmax(W_s x_t + b_s)      T_t = sum_k s_t[k] A_k, every column divided by its p-norm
        h_t = T_t h_{t-1} + W_b x_t       h_0 = 0

    d_input      width of the input, or the number of token ids
    d_state      n
    n_matrices   k, matrices in the dictionary
    p_norm       p of the column norm; at 1 the 1-norm of the state cannot grow by a transition
    init         "xavier" as published, or "identity": every matrix starts as the identity plus normal noise of standard
                 deviation `init_noise`, so that a state survives from the first step on

    Input (b l d_input) float or token ids (b l); a token id is the one-hot vector of that position, and its transition
    is formed once per call however often it occurs. Returns the states (b l n).

    Source: Terzic et al. 2025 (arXiv 2412.19350), section 4.
    """

    def __init__(
        self,
        d_input: int,
        d_state: int = 64,
        n_matrices: int = 8,
        p_norm: float = 1.2,
        init: str = "xavier",
        init_noise: float = 0.05,
    ):
        super().__init__()
        for name, value in (("d_input", d_input), ("d_state", d_state), ("n_matrices", n_matrices)):
            if value < 1:
                raise ValueError(f"{name} = {value}; it must be at least 1")
        if p_norm < 1:
            raise ValueError(f"p_norm = {p_norm}; a norm needs p of at least 1 (published: 1.1 to 1.4)")
        if init not in ("xavier", "identity"):
            raise ValueError(f"init = {init!r}; choose 'xavier' (published) or 'identity'")
        self.d_input, self.d_state, self.p_norm, self.init, self.init_noise = d_input, d_state, p_norm, init, init_noise
        self.A_selector = nn.Linear(d_input, n_matrices)
        self.B = nn.Linear(d_input, d_state, bias=False)
        self.A_dict = nn.Parameter(torch.empty(d_state, d_state, n_matrices))  # row, column, matrix
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.A_selector.reset_parameters()
        self.B.reset_parameters()
        if self.init == "identity":
            identity = torch.eye(self.d_state, device=self.A_dict.device, dtype=self.A_dict.dtype)
            self.A_dict.normal_(0, self.init_noise).add_(identity.unsqueeze(-1))
        else:
            bound = math.sqrt(6 / (2 * self.d_state))  # Xavier uniform of one n x n matrix
            self.A_dict.uniform_(-bound, bound)

    def mixture(self, x: Tensor) -> Tensor:
        """Weights of the dictionary (... k) for inputs (... d_input)."""
        return F.softmax(self.A_selector(x), dim=-1)

    def symbols(self) -> tuple[Tensor, Tensor]:
        """Mixture (d_input k) and input (d_input n) of every token id."""
        if is_plain(self.A_selector, self.B) and self.A_selector.bias is not None and self.B.bias is None:
            return F.softmax(self.A_selector.weight.T + self.A_selector.bias, dim=-1), self.B.weight.T
        one_hot = torch.eye(self.d_input, device=self.A_dict.device, dtype=self.A_dict.dtype)
        return self.mixture(one_hot), self.B(one_hot)

    def forward(
        self,
        x: Tensor,
        state: SDSSMState | None = None,
        *,
        mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
        all_steps: bool = True,
    ) -> tuple[Tensor, SDSSMState]:
        """-> states (b l n), or with all_steps=False the last one (b 1 n), and the state to continue with."""
        if x.is_floating_point():
            weights, inputs, symbols = self.mixture(x), self.B(x), None
        else:
            (weights, inputs), symbols = self.symbols(), x
        h, last = dense_scan(
            self.A_dict,
            weights,
            inputs,
            self.p_norm,
            symbols,
            mask=mask,
            seq_idx=seq_idx,
            initial_state=None if state is None else state.h,
            all_steps=all_steps,
        )
        return h, SDSSMState(last)

    def state_bytes(self, length: int) -> int:
        return self.d_state * itemsize(self)[1]


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
