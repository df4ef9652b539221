"""Losses of Mamba-FSCIL: features onto fixed class directions, and a new branch that is silent on old classes.

b batch, e width of the features, K classes; z the new branch's raw gate; base classes are the labels below `base`.
Source: Li et al. 2024 (arXiv 2407.06136); dot-regression loss and simplex of NC-FSCIL.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ssmzoo.models.mamba_fscil import NeckOutput


def dot_regression(
    f: Tensor, labels: Tensor, directions: Tensor, weight: float = 10.0, with_len: bool = False
) -> Tensor:
    """weight / 2 * mean_i (<f_i / |f_i|, t_i> - |t_i|)^2

    f (b e), labels (b), directions (e K) of unit columns; t_i is the column of label i, scaled by sqrt(gamma / n_c)
    with `with_len`: n_c images of the class in the batch, gamma images per class on average. Labels may be shares of
    classes (b K), as mixed images have: the mean of their losses.
    """
    shares = labels if labels.ndim == 2 else F.one_hot(labels, directions.shape[1]).to(f.dtype)
    error = (F.normalize(f, dim=-1) @ directions - 1).square()  # (b K)
    if with_len:
        counts = shares.sum(0)
        error = error * (len(labels) / (counts > 0).sum() / counts.clamp(min=1))
    return weight / 2 * (shares * error).sum(-1).mean()


def mean_norm(z: Tensor) -> Tensor:
    """Frobenius norm divided by the number of elements; 0 for an empty tensor."""
    return z.norm() / z.numel() if z.numel() else z.sum()


def suppression(z: Tensor, labels: Tensor, base: int, weight_base: float, weight_novel: float) -> dict[str, Tensor]:
    """Pull the gate towards 0 on base classes and away from it on novel ones (this one is not bounded below)."""
    old = labels < base
    losses = {"loss_supp_base": weight_base * mean_norm(z[old])} if weight_base > 0 else {}
    if weight_novel > 0:
        losses["loss_supp_novel"] = -weight_novel * mean_norm(z[~old])
    return losses


def separation(p: Tensor, labels: Tensor, base: int, average: Sequence[int] = (0, 1, 3)) -> Tensor:
    """mean |I - S|, S the cosines between the averages of scan parameters p (b k n l) over base and over novel samples.

    average  the dimensions of p averaged away. 0 unless the batch holds both kinds.
    """
    old = labels < base
    if not old.any() or old.all():
        return p.sum() * 0
    groups = [F.normalize(part.mean(tuple(average)).flatten(), dim=-1) for part in (p[old], p[~old])]
    vectors = torch.stack(groups)
    return (torch.eye(2, device=p.device, dtype=p.dtype) - vectors @ vectors.T).abs().mean()


def incremental_losses(
    out: NeckOutput,
    labels: Tensor,
    base: int,
    weight_supp: float = 0.0,
    weight_supp_novel: float = 0.0,
    weight_sep: float = 0.0,
    weight_sep_new: float = 0.0,
    average: Sequence[int] = (0, 1, 3),
) -> dict[str, Tensor]:
    """The class-sensitive terms, weighted; those of weight 0 are left out."""
    losses = suppression(out.gate, labels, base, weight_supp, weight_supp_novel)
    for suffix, weight in (("", weight_sep), ("_new", weight_sep_new)):
        if weight > 0:
            for name in ("dt", "B", "C"):
                p = getattr(out, name + suffix)
                losses[f"loss_sep_{name}s{suffix}"] = weight * separation(p, labels, base, average)
    return losses
