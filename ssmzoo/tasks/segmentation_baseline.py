"""What a classifier that sees a few pixels knows: the floor for segmentation."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ssmzoo.tasks.metrics.segmentation import IGNORED, confusion, scores

SIDE = 5  # pixels of the neighbourhood


def neighbourhoods(image: Tensor) -> Tensor:
    """(b c y x) -> (b y x c*SIDE*SIDE), mirrored beyond the border"""
    padded = F.pad(image, [SIDE // 2] * 4, mode="reflect")
    return F.unfold(padded, SIDE).mT.unflatten(1, image.shape[2:])


def linear_pixels(data, pixels: int = 20000, pictures: int = 200) -> dict[str, float] | None:
    """Validation scores of scikit-learn's logistic regression on neighbourhoods of training pixels; None without it."""
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        return None
    rng, x, y, taken = np.random.default_rng(0), [], [], 0
    for batch in data.train_dataloader():
        labelled = (batch["classes"] != IGNORED).flatten().nonzero()[:, 0].numpy()
        chosen = rng.permutation(labelled)[: pixels * len(batch["image"]) // pictures]
        x.append(neighbourhoods(batch["image"]).flatten(0, 2)[chosen].numpy())
        y.append(batch["classes"].flatten()[chosen].numpy())
        taken += len(batch["image"])
        if taken >= pictures:
            break
    y = np.concatenate(y)
    if len(np.unique(y)) < 2:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # that a hundred iterations are not all; more change nothing in the first digits
        fitted = LogisticRegression(max_iter=100).fit(np.concatenate(x), y)
    weight, bias = (torch.from_numpy(v).float() for v in (fitted.coef_, fitted.intercept_))
    classes, table, seen = torch.from_numpy(fitted.classes_), 0, 0
    for batch in data.val_dataloader():
        found = neighbourhoods(batch["image"]) @ weight.mT + bias  # (b y x k), of two classes k = 1
        best = (found[..., 0] > 0).long() if found.shape[-1] == 1 else found.argmax(-1)
        predicted = F.interpolate(classes[best][:, None].float(), batch["classes"].shape[1:], mode="nearest")[
            :, 0
        ].long()
        table = table + confusion(predicted, batch["classes"], len(data.classes), IGNORED)
        seen += len(best)
        if seen >= pictures:
            break
    return scores(table)
