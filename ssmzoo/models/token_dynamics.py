"""The two refinements of token dynamics: Mamba whose tokens diverge or converge along depth by a parametrised x_proj,
and an image encoder whose first block sorts the tokens by learned importance.

Depth read as time moves tokens by x_l' = y_l; the non-zero eigenvalues of S_C^T S_B (the rows of x_proj for C and B)
decide: all negative, tokens converge to the origin; one positive, they diverge. `Scenario` prescribes their signs:

    X (r+2n e) the raw weight;  S_dt = X[:r];  P = X[r:r+n];  g = X[r+n:, 0]
    U = P above the diagonal, ones on it, zeros below;   S_C = U,  S_B = diag(lambda) U
    S_C^T S_B = U^T diag(lambda) U: symmetric, n non-zero eigenvalues with the signs of lambda

    "divergent"   lambda =  softplus(g) + 0.7
    "convergent"  lambda = -softplus(g) - 0.7
    "mixed"       lambda =  softplus(g) for the first half of the states, -softplus(g) for the other

Entries of X below P's diagonal and behind the first column of the last block have no effect, as released. The paper's
WikiText-103 model: d_model 768, 24 layers, 25 epochs on 1024 tokens.

The reordering stands in front of the scan of MambaVision's mixer (ssmzoo.layers.image.mamba_vision):

    s = k^T (W_dt dt_r + b_dt),  P = SoftSort(-s),  x <- P x before the projections of the scan: the most important
    token comes last and is never sorted back; z stays in place

P is (l l): for windows of images, not for text.

The paper reorders in the first mixer of every stage of MambaVision-T; here the encoder is one stage without attention
and without windows, so that the effect of the reordering stands alone.

b batch, l tokens, d width, e = expand d, half of it for x and half for z, n state size, r rank of the time step.
Source: Vo et al. 2025 (arXiv 2410.03292), the released experiments on WikiText-103; Hatamizadeh & Kautz
2024 (arXiv 2407.08083) for MambaVision's mixer; Prillo & Eisenschlos 2020 (arXiv 2006.16038) for SoftSort.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from ssmzoo.layers.image.mamba_vision import MambaVisionMixer
from ssmzoo.layers.init import scaled_output_
from ssmzoo.models.mamba import MambaLM
from ssmzoo.models.vim import Vim
from ssmzoo.ops import mix_tokens

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
        pad_vocab_size_multiple: int = 8,
    ):
        more = {"tie_embeddings": tie_embeddings, "pad_vocab_size_multiple": pad_vocab_size_multiple}
        super().__init__(vocab_size, d_model, n_layer, ssm_cfg=ssm_cfg, **more)
        self.scenario = scenario
        choose_scenario(self, scenario)


def soft_sort(v: Tensor, tau: float = 1.0, power: float = 1.0, hard: bool = False) -> Tensor:
    """v (b l) -> P (b l l).

    tau, power  temperature (in units of v^power) and exponent of the distance
    hard        one-hot rows forward, the gradient of the soft ones backward
    """
    distance = (v[:, None, :] - v.sort(dim=-1, descending=True).values[:, :, None]).abs()
    P = torch.softmax(-(distance if power == 1 else distance.pow(power)) / tau, dim=-1)
    if not hard:
        return P
    picked = torch.zeros_like(P).scatter_(-1, P.argmax(-1, keepdim=True), 1.0)
    return picked - P.detach() + P


class SoftSort(nn.Module):
    """`soft_sort` with its settings."""

    def __init__(self, tau: float = 1.0, hard: bool = False, power: float = 1.0):
        super().__init__()
        if tau <= 0 or power <= 0:
            raise ValueError(f"SoftSort needs tau and power above 0, got tau={tau}, power={power}")
        self.tau, self.hard, self.power = tau, hard, power

    def forward(self, v: Tensor) -> Tensor:
        return soft_sort(v, self.tau, self.power, self.hard)


class ReorderingMixer(MambaVisionMixer):
    """(b l d) -> (b l d): `MambaVisionMixer` that sorts the tokens softly by importance before the scan.

    tau, hard   see `SoftSort`; the others as in `MambaVisionMixer`
    """

    def __init__(self, d_model: int, *args, tau: float = 1.0, hard: bool = False, **options):
        super().__init__(d_model, *args, **options)
        self.importance = nn.Linear(self.d_inner // 2, 1, bias=False)
        self.sort = SoftSort(tau, hard)

    def arrange(self, x: Tensor) -> Tensor:
        """Tokens of x (b e/2 l), the most important last."""
        scores = self.importance(self.steps(x)[0].transpose(1, 2)).squeeze(-1)  # (b l)
        return mix_tokens(x, self.sort(-scores))


class ReorderedMamba(Vim):
    """Image classifier. (b c y x) -> (b num_classes).

    reorder      sort tokens in the first block | tau: temperature of the sorting; small is close to a permutation
    d_conv, expand   of the mixers; the other arguments as in `Vim`
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        img_size: int | Sequence[int] = 224,
        patch_size: int = 16,
        embed_dim: int = 192,
        depth: int = 24,
        d_state: int = 8,
        d_conv: int = 3,
        expand: float = 1,
        reorder: bool = True,
        tau: float = 1.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
    ):
        super().__init__(
            in_chans,
            num_classes,
            global_pool,
            img_size,
            patch_size,
            None,
            embed_dim,
            depth,
            d_state,
            class_token="none",
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
        )
        for i, layer in enumerate(self.layers):
            sizes = (embed_dim, d_state, d_conv, expand)
            layer.mixer = ReorderingMixer(*sizes, tau=tau) if reorder and i == 0 else MambaVisionMixer(*sizes)
            scaled_output_(layer.mixer.out_proj.weight, depth)
            nn.init.trunc_normal_(layer.mixer.in_proj.weight, std=0.02)
