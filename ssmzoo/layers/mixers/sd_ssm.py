"""The mixer of SD-SSM: one recurrence whose transition is a token-dependent mixture of dense matrices."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmzoo.layers.plain import is_plain
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
