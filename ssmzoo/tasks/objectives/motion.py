"""Losses of motion: rotations, their changes from frame to frame, codes.

    rotation    mean angle between rotation matrices, radians
    velocity, acceleration   L1 of the first and second differences of the matrices (of expressions: mean squares)

Source: MambaTalk's stage 1 and stage 2 (project @b3c30e4, ae_trainer.py, mambatalk_trainer.py). The losses on SMPL-X
vertices are left out: the body model needs a licence.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ssmzoo.ops.rotation import geodesic, matrix_of_6d

ROTATIONS = {"face": 1, "upper": 13, "hands": 30, "lower": 9}  # joints in front of each part's channels


def changes(a: Tensor, b: Tensor, loss=F.l1_loss) -> Tensor:
    """Of the first and second differences over frames (b l ...)."""
    first = [x[:, 1:] - x[:, :-1] for x in (a, b)]
    return loss(*first) + loss(*(x[:, 1:] - x[:, :-1] for x in first))


def part_loss(part: str, got: Tensor, truth: Tensor) -> Tensor:
    """Of one part's motion (b l c); all terms weigh 1."""
    joints = ROTATIONS[part]
    a, b = (matrix_of_6d(x[..., : 6 * joints].unflatten(-1, (joints, 6))) for x in (got, truth))
    loss = geodesic(a, b).mean() + changes(a, b)
    if part == "face":
        expression = got[..., 6:], truth[..., 6:]
        loss = loss + F.mse_loss(*expression) + changes(*expression, loss=F.mse_loss)
    if part == "lower":
        loss = loss + F.mse_loss(got[..., 57:], truth[..., 57:])
    return loss


def speech_loss(rec: dict[str, Tensor], cls: dict, latent: dict, code: dict, face_weight: float = 1.0) -> Tensor:
    """3 x the error of the latents plus the cross entropy of the codes in nats, summed over the parts."""
    reconstruction = sum(F.mse_loss(rec[part], latent[part]) for part in rec)
    weights = dict.fromkeys(cls, 1.0) | {"face": face_weight}
    named = sum(w * F.cross_entropy(cls[part].flatten(0, 1), code[part].flatten()) for part, w in weights.items() if w)
    return 3 * reconstruction + named


def random_mask(like: Tensor, share: float) -> Tensor:
    """1 for a share of the elements."""
    return (torch.rand_like(like) < share).to(like.dtype)


def seed_mask(like: Tensor, seeds: int = 4) -> Tensor:
    """1 for all (b l c) but the first frames."""
    mask = torch.ones_like(like)
    mask[:, :seeds] = 0
    return mask
