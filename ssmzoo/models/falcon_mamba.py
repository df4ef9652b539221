"""Falcon-Mamba: the Mamba language model with a norm on what its projections give the scan.

    dt, B, C = split(W_x x);   each of the three / sqrt(mean of its squares + eps), without weights, before the scan

Everything else is models/mamba.py; the norm keeps the scan's inputs bounded at 7 billion parameters.
Source: Falcon Mamba (arXiv 2410.05355); Hugging Face transformers models/falcon_mamba (Apache-2.0) for names.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssmzoo.layers.mixers.mamba import Mamba
from ssmzoo.layers.norm import fp32
from ssmzoo.models.mamba import MambaLM


class NormedProjection(nn.Linear):
    """x (... e) -> [dt | B | C] (... r+2n), each part divided by its root mean square, in fp32 or better."""

    def __init__(self, d_inner: int, parts: tuple[int, int, int], eps: float):
        super().__init__(d_inner, sum(parts), bias=False)
        self.parts, self.eps = parts, eps

    def forward(self, x: Tensor) -> Tensor:
        split = super().forward(x).split(self.parts, dim=-1)
        return torch.cat([F.rms_norm(fp32(part), part.shape[-1:], eps=self.eps).to(part.dtype) for part in split], -1)


class FalconMambaMixer(Mamba):
    """Causal mixer (b l d) -> (b l d). mixer_rms_eps is the norm's; other arguments as in `Mamba`."""

    def __init__(self, d_model: int, d_state: int = 16, mixer_rms_eps: float = 1e-6, **mamba):
        super().__init__(d_model, d_state, **mamba)
        plain = self.x_proj
        self.x_proj = NormedProjection(self.d_inner, (self.dt_rank, d_state, d_state), mixer_rms_eps)
        self.x_proj.weight = plain.weight


class FalconMambaLM(MambaLM):
    """ids (b l) -> ModelOutput(logits (b l v), state, {}). Arguments of MambaLM; `ssm_cfg` are those of the mixer."""

    mixer = FalconMambaMixer
