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

MambaVision's mixer of one sequence, and the reordering in front of its scan:

    x, z = split(W_in u);   x = SiLU(conv_x x),  z = SiLU(conv_z z)        convolutions with as much after as before
    [dt_r, B, C] = W_x x;   dt = softplus(W_dt dt_r + 2 b_dt);   y = scan(x)        out = W_out [y, z]
    reorder:  s = k^T (W_dt dt_r + b_dt),  P = SoftSort(-s),  x <- P x before the projections of the scan: the most
              important token comes last and is never sorted back; z stays in place

No gate: the halves are concatenated. b_dt counts twice, as released (in the projection and in the scan).
Not causal, and P is (l l): for windows of images, not for text.

The paper reorders in the first mixer of every stage of MambaVision-T; here the encoder is one stage without attention
and without windows, so that the effect of the reordering stands alone.

b batch, l tokens, d width, e = expand d, half of it for x and half for z, n state size, r rank of the time step.
Source: Vo et al. 2025 (arXiv 2410.03292), the released experiments on WikiText-103; Hatamizadeh & Kautz
2024 (arXiv 2407.08083) for MambaVision's mixer; Prillo & Eisenschlos 2020 (arXiv 2006.16038) for SoftSort.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from ssmzoo.layers.init import A_log_s4d_real_, scaled_output_
from ssmzoo.layers.mixers.mamba import MambaInit
from ssmzoo.layers.norm import fp32
from ssmzoo.layers.plain import is_plain
from ssmzoo.models.mamba import MambaLM
from ssmzoo.models.vim import Vim
from ssmzoo.ops import mix_tokens, selective_scan_fn

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


class MambaVisionMixer(nn.Module):
    """(b l d) -> (b l d).

    d_model, d_state, d_conv, expand, dt_rank   d, n, taps, e / d, r or "auto" = ceil(d / 16)
    init        fields of ssmzoo.layers.mixers.mamba.MambaInit, by name
    bias        of the input and output projections
    reorder     sort the tokens softly by importance before the scan; tau, hard: see `SoftSort`
    """

    Options = MambaInit

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | str = "auto",
        bias: bool = False,
        reorder: bool = False,
        tau: float = 1.0,
        hard: bool = False,
        **init,
    ):
        super().__init__()
        e = self.d_inner = int(expand * d_model)
        if e % 2 or e < 2:
            raise ValueError(
                f"expand * d_model = {e} must be even: half of it is scanned; got d_model={d_model}, expand={expand}"
            )
        half, r = e // 2, math.ceil(d_model / 16) if dt_rank == "auto" else int(dt_rank)
        self.dt_rank, self.d_state, self.init = r, d_state, MambaInit(**init)
        self.in_proj = nn.Linear(d_model, e, bias=bias)
        self.conv1d_x = nn.Conv1d(half, half, d_conv, groups=half, bias=False, padding="same")
        self.conv1d_z = nn.Conv1d(half, half, d_conv, groups=half, bias=False, padding="same")
        self.x_proj = nn.Linear(half, r + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(r, half)
        self.A_log = nn.Parameter(torch.empty(half, d_state))
        self.D = nn.Parameter(torch.empty(half))
        self.out_proj = nn.Linear(e, d_model, bias=bias)
        self.importance = nn.Linear(half, 1, bias=False) if reorder else None
        self.sort = SoftSort(tau, hard) if reorder else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As in Mamba; the rest keeps torch's default."""
        self.init.time_step_(self.dt_proj)
        A_log_s4d_real_(self.A_log)
        nn.init.ones_(self.D)

    def forward(self, u: Tensor) -> Tensor:
        x, z = self.in_proj(u).transpose(1, 2).chunk(2, dim=1)  # (b e/2 l)
        x, z = F.silu(self.conv1d_x(x)), F.silu(self.conv1d_z(z))
        if self.sort is not None:
            x = self.reorder(x)
        dt, B, C = self.steps(x)
        bias = self.dt_proj.bias if is_plain(self.dt_proj) else self.dt_proj(x.new_zeros(1, self.dt_rank))[0]
        y = selective_scan_fn(
            x,
            dt,
            -torch.exp(fp32(self.A_log)),
            B,
            C,
            fp32(self.D),
            delta_bias=fp32(bias),
            delta_softplus=True,
        )
        return self.out_proj(torch.cat([y, z], dim=1).transpose(1, 2))

    def steps(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (b e/2 l) -> dt before the scan's own bias (b e/2 l), B and C (b n l)"""
        n = self.d_state
        dt, B, C = self.x_proj(x.transpose(1, 2)).split([self.dt_rank, n, n], dim=-1)
        return self.dt_proj(dt).transpose(1, 2), B.transpose(1, 2), C.transpose(1, 2)

    def reorder(self, x: Tensor) -> Tensor:
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
            layer.mixer = MambaVisionMixer(embed_dim, d_state, d_conv, expand, reorder=reorder and i == 0, tau=tau)
            scaled_output_(layer.mixer.out_proj.weight, depth)
            nn.init.trunc_normal_(layer.mixer.in_proj.weight, std=0.02)
