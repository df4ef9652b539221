"""Reordering tokens in PyTorch: whole rows are moved, flipped or mixed."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmzoo.ops.token_order import bidirectional_scan, mix_tokens, permute_tokens, prepend_mean


@permute_tokens.register("torch")
def permute_tokens_torch(a) -> Tensor:
    order = a.order.argsort(-1) if a.inverse else a.order
    if order.ndim == 1:
        return a.x.index_select(1, order)
    b, l, _ = a.x.shape
    rows = order + l * torch.arange(b, device=order.device)[:, None]  # of (b*l d): whole rows move, as gather cannot
    return a.x.flatten(0, 1).index_select(0, rows.flatten()).view(a.x.shape)


@bidirectional_scan.register("torch")
def bidirectional_scan_torch(a) -> Tensor:
    return torch.stack([a.x, a.x.flip(-1)], dim=1)


@prepend_mean.register("torch")
def prepend_mean_torch(a) -> Tensor:
    return torch.cat([a.x.mean(1, keepdim=True), a.x], dim=1)


@mix_tokens.register("torch")
def mix_tokens_torch(a) -> Tensor:
    return a.x @ a.weights.transpose(1, 2)
