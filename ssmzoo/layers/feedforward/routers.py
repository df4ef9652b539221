"""Further routers by token choice: with noise and its losses, by cumulated probability.

    noisy top-k   H = x W_g + N(0,1) softplus(x W_noise);   softmax over the k largest H
                  importance  w CV^2_e(sum_t gate_te)
                  load        w CV^2_e(sum_t P(e stays chosen when its noise is drawn again))
    top-p         the fewest experts of largest p whose sum reaches top_p;   entropy loss  w E sum_e P_e log P_e

CV is the standard deviation over experts divided by the mean, P_e the mean probability of expert e. These losses are
over the tokens of one process and micro-batch.
t tokens, d width, e experts, k choices.
Source: noisy top-k: Shazeer et al. 2017 (arXiv 1701.06538), section 4 and appendix A; top-p with the entropy loss:
HMoE (arXiv 2408.10681).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssmzoo.layers.feedforward.router import TokenChoice
from ssmzoo.ops.moe_dispatch import Groups, group_by_expert


class NoisyTopK(TokenChoice):
    """Token choice by noisy logits, weighted by the softmax over the chosen; both matrices are zero at first.

    importance_weight, load_weight   w of the two losses | choices, capacities and further losses: of TokenChoice
    """

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        top_k: int = 2,
        capacity_factor: float | None = None,
        eval_capacity_factor: float | None = None,
        importance_weight: float = 0.1,
        load_weight: float = 0.1,
        **token_choice,
    ):
        if min(importance_weight, load_weight) < 0:
            raise ValueError(f"loss weights must not be negative, got {importance_weight=}, {load_weight=}")
        super().__init__(
            d_model,
            n_experts,
            top_k,
            capacity_factor,
            eval_capacity_factor,
            **{"balance_weight": 0.0, "renormalise": True} | token_choice,
        )
        self.importance_weight, self.load_weight = importance_weight, load_weight
        self.noise = nn.Parameter(torch.zeros(d_model, n_experts))
        nn.init.zeros_(self.gate)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Groups, Tensor, dict[str, Tensor]]:
        x, mask = x.flatten(0, 1), None if mask is None else mask.flatten()
        clean = self.logits(x)  # (t e)
        spread = F.softplus(x.to(clean.dtype) @ self.noise.to(clean.dtype))
        noisy = clean + torch.randn_like(clean) * spread if self.training else clean
        groups, weight, aux = self.choose(noisy, mask)
        real = 1.0 if mask is None else mask[:, None].to(clean.dtype)
        if self.importance_weight:
            best = noisy.topk(self.top_k)
            gates = torch.zeros_like(noisy).scatter(1, best.indices, best.values.softmax(-1))
            aux["importance_loss"] = self.importance_weight * squared_variation((gates * real).sum(0))
        if self.load_weight and self.top_k < self.n_experts:
            aux["load_loss"] = self.load_weight * squared_variation((self.stays(clean, noisy, spread) * real).sum(0))
        return groups, weight, aux

    def stays(self, clean: Tensor, noisy: Tensor, spread: Tensor) -> Tensor:
        """Probability (t e) that an expert is among the k when its noise alone is drawn again."""
        best = noisy.topk(self.top_k + 1).values
        inside = noisy >= best[:, -2:-1]  # to stay it must beat the best one outside, else the worst one inside
        rival = torch.where(inside, best[:, -1:], best[:, -2:-1])
        return torch.special.ndtr((clean - rival) / spread.clamp(min=1e-6))


class TopP(TokenChoice):
    """Every token takes experts of decreasing probability until their sum reaches top_p: more where it is undecided.

    entropy_weight   w of the entropy loss | further losses: of TokenChoice; nothing is dropped
    """

    def __init__(self, d_model: int, n_experts: int, top_p: float = 0.6, entropy_weight: float = 3e-2, **token_choice):
        if not 0 < top_p <= 1:
            raise ValueError(
                f"top_p = {top_p} must lie in (0, 1]: the probability that the chosen experts reach together"
            )
        if entropy_weight < 0:
            raise ValueError(f"loss weights must not be negative, got {entropy_weight=}")
        super().__init__(d_model, n_experts, top_k=n_experts, **{"balance_weight": 0.0} | token_choice)
        self.top_p, self.entropy_weight = top_p, entropy_weight

    @property
    def active_experts(self) -> float:
        """Experts per token of a router that is undecided, the most there can be on average."""
        return min(self.n_experts, int(self.top_p * self.n_experts) + 1)

    def choose(self, logits: Tensor, mask: Tensor | None) -> tuple[Groups, Tensor, dict[str, Tensor]]:
        p = logits.softmax(-1)
        weight, expert = p.sort(dim=-1, descending=True)  # (t e)
        taken = weight.cumsum(-1) - weight < self.top_p  # the sum before it has not reached top_p
        expert = expert.masked_fill(~taken, self.n_experts)  # nobody
        if self.renormalise:
            weight = weight / (weight * taken).sum(-1, keepdim=True)
        groups = group_by_expert(expert, self.n_experts, mask=mask)
        aux = self.losses(logits, p, groups, mask)
        real = torch.ones_like(p[:, 0]) if mask is None else mask.to(p.dtype)
        n = real.sum().clamp(min=1)
        mean = real @ p / n  # (e)
        if self.entropy_weight:
            aux["router_entropy_loss"] = self.entropy_weight * self.n_experts * torch.xlogy(mean, mean).sum()
        aux["dropped_fraction"] = torch.zeros_like(n)
        aux["experts_per_token"] = groups.ends[-1] / n
        return groups, weight.flatten()[groups.choice], aux


def squared_variation(x: Tensor) -> Tensor:
    """(std / mean)^2 over the experts, x (e)."""
    return x.var(correction=0) / x.mean().square().clamp(min=1e-10)
