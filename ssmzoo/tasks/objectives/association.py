"""Losses and score of Anomaly Transformer and MAAT: reconstruction and the discrepancy of two associations.

    kl(p, q)_bi  = mean over heads of sum_j p_ij (log(p_ij + 1e-4) - log(q_ij + 1e-4))
    d(p, q)      = kl(p, q) + kl(q, p)
    series_loss  = mean over layers, windows and points of d(S, sg(Pn)),  prior_loss the same of d(sg(S), Pn)
    loss1        = rec - k series_loss,   loss2 = rec + k prior_loss      rec the mean squared error

Pn is the prior with rows of sum 1, sg stops gradients: loss1 pushes the attention away from the prior, loss2 pulls the
prior's width after it. Both losses are back-propagated and their gradients added; d is symmetric, so that both
discrepancies have the same value. Series S, prior P (b h l l).
Source: Xu et al. 2022 (ICLR), section 3.2, by the released solver.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ssmzoo.layers.series.association import AnomalyOutput

EPSILON = 1e-4


class AssociationLosses(NamedTuple):
    """Scalars; rec is in squared standard deviations of the training part."""

    rec: Tensor
    series: Tensor
    prior: Tensor
    loss1: Tensor
    loss2: Tensor


def normalised(prior: Tensor) -> Tensor:
    """The prior with rows of sum 1."""
    return prior / prior.sum(-1, keepdim=True)


def kl(p: Tensor, q: Tensor) -> Tensor:
    """Divergence of every point, (b l)."""
    return (p * ((p + EPSILON).log() - (q + EPSILON).log())).sum(-1).mean(1)


def discrepancy(p: Tensor, q: Tensor) -> Tensor:
    """kl(p, q) + kl(q, p) of every point, (b l)."""
    return ((p - q) * ((p + EPSILON).log() - (q + EPSILON).log())).sum(-1).mean(1)


def association_losses(out: AnomalyOutput, x: Tensor, k: float = 3.0) -> AssociationLosses:
    """Both losses of windows x (b l c)."""
    rec = (out.reconstruction - x).square().mean()
    pairs = [(s, normalised(p)) for s, p in zip(out.series, out.prior)]
    series = _mean([discrepancy(s, p.detach()).mean() for s, p in pairs])
    prior = _mean([discrepancy(s.detach(), p).mean() for s, p in pairs])
    return AssociationLosses(rec, series, prior, rec - k * series, rec + k * prior)


def anomaly_score(out: AnomalyOutput, x: Tensor, temperature: float = 50.0) -> Tensor:
    """(b l), not negative: squared error times softmax over the window of minus temperature times the discrepancy.

    The discrepancy is summed over layers, each direction differentiable in its first argument, as released.
    """
    error = (out.reconstruction - x).square().mean(-1)
    pairs = [(s, normalised(p)) for s, p in zip(out.series, out.prior)]
    seen = sum(kl(s, p.detach()) + kl(p, s.detach()) for s, p in pairs)
    return torch.softmax(-temperature * seen, dim=-1) * error


def _mean(values: Sequence[Tensor]) -> Tensor:
    return sum(values) / len(values)
