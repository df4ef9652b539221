"""From hidden attention to explanation maps: raw attention, rollout, attribution.

Two families. The functions on full matrices follow the paper's definition and suit any model; those on class-token
rows (layers, channels, tokens) reproduce the released code for Vim, whose rollout adds the class token's row to every
row of the identity.

b batch, d channels, l tokens.
Source: Ali, Zimerman & Wolf (arXiv 2403.01590); the rollout is Abnar & Zuidema's (arXiv 2005.00928).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

TINY = 1e-12


def min_max(x: Tensor, dims: Sequence[int] | None = None) -> Tensor:
    """Scaled to [0, 1] over `dims` (all of them by default); constants become 0."""
    dims = tuple(range(x.ndim)) if dims is None else tuple(dims)
    low, high = x.amin(dims, keepdim=True), x.amax(dims, keepdim=True)
    return (x - low) / (high - low).clamp(min=TINY)


def rollout(layers: Sequence[Tensor], absolute: bool = True) -> Tensor:
    """Product over layers of row-normalised (I + a): (b l l) each -> (b l l); row i says what token i was made of.

    layers    token-to-token maps, first layer first, e.g. means over channels
    absolute  take |a| first, so that rows are positive weights; False keeps signs (rows whose sum is tiny stay as they
              are)
    """
    if not layers:
        raise ValueError("rollout needs at least one layer's attention")
    product = None
    for a in layers:
        a = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device) + (a.abs() if absolute else a)
        total = a.sum(-1, keepdim=True)
        a = a / torch.where(total.abs() < 1e-8, torch.ones_like(total), total)
        product = a if product is None else a @ product
    return product


def without(x: Tensor, token: int) -> Tensor:
    """(... l) -> (... l-1) without the class token, negative values as 0."""
    return torch.cat([x[..., :token], x[..., token + 1 :]], dim=-1).clamp(min=0)


def _layers(rows: Tensor, start: int) -> range:
    if not 0 <= start < len(rows):
        raise ValueError(f"start = {start}; there are {len(rows)} layers")
    return range(start, len(rows))


def raw(rows: Tensor, token: int, start: int = 0) -> Tensor:
    """Mean over the layers from `start` of every layer's rows, min-max over channels and tokens. (m d l) -> (1 l-1)"""
    return without(torch.stack([min_max(rows[i]).mean(0) for i in _layers(rows, start)]).mean(0)[None], token)


def _rolled_rows(vectors: list[Tensor], token: int) -> Tensor:
    """Rollout of row vectors (l), each added to every row of the identity -> (1 l-1)"""
    product = None
    for a in vectors:
        R = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device) + a
        R = R / R.sum(-1, keepdim=True)
        product = R if product is None else R @ product
    return without(product[token][None], token)


def rollout_cls_row(rows: Tensor, token: int, start: int = 0) -> Tensor:
    """The released rollout: rows (m d l), their means over channels signed -> (1 l-1)"""
    return _rolled_rows([rows[i].mean(0) for i in _layers(rows, start)], token)


def attribution(rows: Tensor, gradient: Tensor, token: int, start: int = 0) -> Tensor:
    """Mamba attribution: rollout of rows weighted by the gradient at every layer's input.

    rows      (m d l), clamped at 0 and scaled per layer
    gradient  (m l w) of the chosen logit with respect to the residual stream entering every layer
    returns   (1 l-1)
    """
    vectors = [min_max(rows[i].clamp(min=0)).mean(0) * gradient_weight(gradient[i]) for i in _layers(rows, start)]
    return _rolled_rows(vectors, token)


def gradient_weight(gradient: Tensor) -> Tensor:
    """(... l w) -> (... l): min-max over tokens of the largest positive entry of every token's gradient."""
    return min_max(gradient.clamp(min=0).amax(-1), (-1,))
