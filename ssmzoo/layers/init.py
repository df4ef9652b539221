"""Initial values that several layers share; each function's docstring is its distribution."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn


def dt_bias_(bias: Tensor, dt_min: float = 1e-3, dt_max: float = 0.1, floor: float = 1e-4) -> Tensor:
    """Fill with softplus^-1(dt), dt log-uniform in [dt_min, dt_max] tokens and at least `floor`."""
    if not 0 < dt_min <= dt_max:
        raise ValueError(f"need 0 < dt_min <= dt_max, got dt_min={dt_min}, dt_max={dt_max}")
    with torch.no_grad():
        dt = torch.empty_like(bias).uniform_(math.log(dt_min), math.log(dt_max)).exp_().clamp_(min=floor)
        return bias.copy_(dt + torch.log(-torch.expm1(-dt)))


def A_log_s4d_real_(A_log: Tensor) -> Tensor:
    """Fill (..., n) with log(1), log(2), ..., log(n): A = -1 .. -n in every channel."""
    with torch.no_grad():
        return A_log.copy_(torch.arange(1, A_log.shape[-1] + 1, dtype=A_log.dtype, device=A_log.device).log())


def A_log_uniform_(A_log: Tensor, low: float = 1.0, high: float = 16.0) -> Tensor:
    """Fill with log(a), a ~ U(low, high)."""
    if not 0 < low <= high:
        raise ValueError(f"A_init_range needs 0 < low <= high, got ({low}, {high})")
    with torch.no_grad():
        return A_log.uniform_(low, high).log_()


def scaled_output_(weight: Tensor, n_layer: int) -> Tensor:
    """Redraw a projection into the residual stream: torch's Linear default, divided by sqrt(n_layer)."""
    nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
    with torch.no_grad():
        return weight.div_(math.sqrt(n_layer))


def causal_lm_(model: nn.Module) -> None:
    """Embedding and head N(0, 0.02), projections into the residual stream torch's default / sqrt(n_layer)."""
    nn.init.normal_(model.embedding.weight, std=0.02)
    nn.init.normal_(model.head.weight, std=0.02)
    for name, module in model.blocks.named_modules():
        if name.endswith(("out_proj", "fc2")):
            scaled_output_(module.weight, len(model.blocks))


def truncated_normal_(weight: Tensor, fan_in: float, scale: float = 0.1) -> Tensor:
    """Fill with N(0, scale / fan_in), cut at the absolute bounds +-2 scale (not at two standard deviations)."""
    return nn.init.trunc_normal_(weight, std=math.sqrt(scale / fan_in), a=-2 * scale, b=2 * scale)


@dataclass
class MambaInit:
    """Initial values of the time step.

    dt_min, dt_max, dt_init_floor      its range, in tokens
    dt_init, dt_scale    W_dt starts in U(-s, s) ("random") or at s ("constant"), s = dt_scale / sqrt(r)
    """

    dt_min: float = 0.001
    dt_max: float = 0.1
    dt_init: str = "random"
    dt_scale: float = 1.0
    dt_init_floor: float = 1e-4

    def __post_init__(self):
        if self.dt_init not in ("random", "constant"):
            raise ValueError(f"dt_init must be 'random' or 'constant', got {self.dt_init!r}")

    def time_step_(self, dt_proj: nn.Linear) -> None:
        """Fill W_dt and b_dt."""
        s = self.dt_scale * dt_proj.in_features**-0.5
        nn.init.uniform_(dt_proj.weight, s if self.dt_init == "constant" else -s, s)
        dt_bias_(dt_proj.bias, self.dt_min, self.dt_max, self.dt_init_floor)


def time_step_rank(dt_rank: int | str, d_model: int) -> int:
    """r: a number, or "auto" = ceil(d / 16)."""
    return math.ceil(d_model / 16) if dt_rank == "auto" else int(dt_rank)
