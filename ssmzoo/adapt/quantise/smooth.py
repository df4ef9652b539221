"""SmoothQuant-like scaling, a baseline: part of the size of an activation's channel moves into the weights behind it.

    s_j = max|x_j|^alpha / max|W_j|^(1 - alpha);   norm's weight and bias <- / s;   columns of the readers <- * s

The function stays the same. Source: Xiao et al. 2022 (arXiv 2211.10438).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ssmzoo.adapt.quantise.norms import scale_columns
from ssmzoo.adapt.quantise.observers import RunningMax
from ssmzoo.adapt.quantise.structure import skeleton
from ssmzoo.adapt.quantise.tap import Taps, run
from ssmzoo.layers.feedforward.router import Router


@torch.no_grad()
def smooth(model: nn.Module, samples: Sequence[Tensor], alpha: float = 0.5) -> nn.Module:
    """Scale the channels between the norms and their readers by what they are on the samples; in place."""
    parts = skeleton(model)
    groups = list(parts.groups())
    width = parts.embedding.embedding_dim
    seen = [RunningMax(torch.arange(width)) for _ in groups]
    with Taps() as taps:
        for group, observer in zip(groups, seen):
            taps.outputs(group.norm, observer.update)
        run(model, samples)
    for group, observer in zip(groups, seen):
        columns = [
            r.gate.abs().amax(1) if isinstance(r, Router) else r.weight.abs().amax(0) for r in group.sides.readers
        ]
        most = torch.stack(columns).amax(0).clamp_min(1e-5)
        s = (observer.value.clamp_min(1e-5) ** alpha / most ** (1 - alpha)).clamp(1e-3, 1e3).double()
        for reader in group.sides.readers:
            scale_columns(reader, s)
        group.norm.weight.copy_(group.norm.weight.double() / s)
        if getattr(group.norm, "bias", None) is not None:
            group.norm.bias.copy_(group.norm.bias.double() / s)
    return model
