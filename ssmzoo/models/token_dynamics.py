"""Token dynamics: Mamba whose tokens are made to diverge, converge or both along depth, by a parametrised x_proj.

Depth read as time moves tokens by x_l' = y_l; the non-zero eigenvalues of S_C^T S_B (the rows of x_proj for C and B)
decide: all negative, tokens converge to the origin; one positive, they diverge.

    X (r+2n e) the raw weight;  S_dt = X[:r];  P = X[r:r+n];  g = X[r+n:, 0]
    U = P above the diagonal, ones on it, zeros below;   S_C = U,  S_B = diag(lambda) U
    S_C^T S_B = U^T diag(lambda) U: symmetric, n non-zero eigenvalues with the signs of lambda

    "divergent"   lambda =  softplus(g) + 0.7
    "convergent"  lambda = -softplus(g) - 0.7
    "mixed"       lambda =  softplus(g) for the first half of the states, -softplus(g) for the other

Entries of X below P's diagonal and behind the first column of the last block have no effect, as released. The paper's
WikiText-103 model: d_model 768, 24 layers, 25 epochs on 1024 tokens.
Source: Vo et al. 2025 (arXiv 2410.03292), the released experiments on WikiText-103.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from ssmzoo.models.mamba import MambaLM

SCENARIOS = ("divergent", "convergent", "mixed")
MARGIN = 0.7


class Scenario(nn.Module):
    """X (r+2n e) -> the weight of x_proj with rows [dt, B, C]."""

    def __init__(self, scenario: str, dt_rank: int, d_state: int):
        super().__init__()
        if scenario not in SCENARIOS:
            raise ValueError(f"scenario is {scenario!r}; expected one of {', '.join(SCENARIOS)}")
        self.scenario, self.dt_rank, self.d_state = scenario, dt_rank, d_state

    def forward(self, X: Tensor) -> Tensor:
        S_dt, P, G = X.split([self.dt_rank, self.d_state, self.d_state])
        U = torch.triu(P, 1) + torch.eye(*P.shape, dtype=P.dtype, device=P.device)
        return torch.cat([S_dt, self.eigenvalue_signs(G[:, :1]) * U, U])

    def eigenvalue_signs(self, g: Tensor) -> Tensor:
        """lambda (n 1)"""
        if self.scenario == "mixed":
            half = torch.arange(self.d_state, device=g.device)[:, None] < self.d_state // 2
            return torch.where(half, F.softplus(g), -F.softplus(g))
        size = F.softplus(g) + MARGIN
        return size if self.scenario == "divergent" else -size


def choose_scenario(model: nn.Module, scenario: str) -> int:
    """Parametrise x_proj of every Mamba mixer of `model` in place; returns how many."""
    mixers = [m for m in model.modules() if isinstance(getattr(m, "x_proj", None), nn.Linear) and hasattr(m, "dt_rank")]
    for mixer in mixers:
        parametrize.register_parametrization(mixer.x_proj, "weight", Scenario(scenario, mixer.dt_rank, mixer.d_state))
    return len(mixers)


class ScenarioMambaLM(MambaLM):
    """ids (b l) -> ModelOutput(logits (b l v), state, {}).

    scenario   "divergent" (no token can collapse to the origin), "convergent" or "mixed"; the others as in `MambaLM`
    """

    def __init__(
        self,
        vocab_size: int = 50277,
        d_model: int = 768,
        n_layer: int = 24,
        scenario: str = "divergent",
        ssm_cfg: Mapping[str, Any] | None = None,
        tie_embeddings: bool = True,
    ):
        super().__init__(vocab_size, d_model, n_layer, ssm_cfg=ssm_cfg, tie_embeddings=tie_embeddings)
        self.scenario = scenario
        choose_scenario(self, scenario)
