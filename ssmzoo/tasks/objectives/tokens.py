"""Token-selective losses: the loss of a batch is the mean over the tokens that are hardest now.

    score_j = -log p(label_j)              by = "loss": minimises the mean of the worst tokens (CVaR)
    score_j = -sum_v p_v log p_v           by = "entropy": tokens that the model is undecided about

The selection carries no gradient, and positions without a label take no part. A share of the tokens is kept, ties
included or left out by their order, so that a batch weighs in an update by the tokens it has.
Source: ESLM (arXiv 2505.19893); RHO-1 (arXiv 2404.07965) for the share that is kept.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

SCORES = ("loss", "entropy")


def kept_tokens(count: Tensor | int, share: float) -> Tensor | int:
    """How many of `count` labelled tokens are kept: the share rounded up, so that one is kept where there is one."""
    if isinstance(count, int):
        return math.ceil(round(share * count, 9))
    return torch.ceil(torch.round(share * count.double(), decimals=9)).long()


@torch.no_grad()
def select_tokens(logits: Tensor, labels: Tensor, share: float, by: str = "loss", ignore: int = -100) -> Tensor:
    """logits (b l v), labels (b l) -> labels with `ignore` where a token is left out."""
    logits, flat = logits.float().flatten(0, 1), labels.flatten()
    if by == "loss":
        scores = F.cross_entropy(logits, flat, ignore_index=ignore, reduction="none")
    else:
        log_p = logits.log_softmax(-1)
        scores = -(log_p.exp() * log_p).sum(-1)
    real = flat != ignore
    order = scores.masked_fill(~real, -math.inf).argsort(descending=True)  # a number of tokens is not known on a GPU
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return flat.masked_fill(rank >= kept_tokens(real.sum(), share), ignore).view_as(labels)
