"""Local attribution map of a restoration model: which input pixels the restored details of one window are made of.

    D(y) = sum of |differences of neighbours| in the window       what counts as detail
    LAM  = sum over k of (x_k - x_{k-1}) * d D(F(x_k)) / d x     x_0 ... x_K: from a blurred picture to the picture
    DI   = 100 (1 - Gini(|LAM|))                                  diffusion index: the larger, the more pixels take part

b batch, c channels, y x rows and columns.
Source: Gu & Dong 2021 (arXiv 2011.11824), whose path is a blur of falling width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssmzoo.probes.receptive_field import centred_share, show_field


class Attribution(NamedTuple):
    """map (y x) of |LAM|, largest value 1, mean over pictures | diffusion: DI, mean over pictures | shares: side of the
    smallest centred square with 50, 95 and 99 % of the map, over the side of the picture."""

    map: Tensor
    diffusion: float
    shares: dict[int, float]


def blurred(images: Tensor, sigma: float) -> Tensor:
    """Gaussian blur (b c y x), mirrored borders; sigma in pixels."""
    if sigma < 1e-3:
        return images
    radius = max(1, round(4 * sigma))
    taps = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, dtype=images.dtype) / sigma) ** 2)
    taps = (taps / taps.sum()).expand(images.shape[1], 1, -1)
    images = F.pad(images, (radius,) * 4, mode="reflect")
    images = F.conv2d(images, taps[:, :, None], groups=images.shape[1])
    return F.conv2d(images, taps[..., None], groups=images.shape[1])


def local_attribution(
    model: nn.Module, images: Tensor, window: int = 8, steps: int = 24, sigma: float = 1.2
) -> Attribution:
    """The map of `window` x `window` pixels (of the input's size) in the middle of every picture (b c y x)."""
    if images.ndim != 4 or not images.is_floating_point() or min(images.shape[-2:]) < 2 * window:
        raise ValueError(
            f"a local attribution map needs pictures (batch, channels, height, width) of {2 * window} pixels a side or "
            f"more, got {tuple(images.shape)}"
        )
    path = [blurred(images, sigma * (1 - k / steps)) for k in range(steps + 1)]
    total = torch.zeros_like(images)
    for before, after in zip(path, path[1:]):
        leaf = after.detach().requires_grad_()
        with torch.enable_grad():
            y = model(leaf)
            if not isinstance(y, Tensor) or y.ndim != 4 or y.shape[-1] % images.shape[-1]:
                raise ValueError(
                    f"{type(model).__name__} returns no restored pictures; local attribution is for restoration models"
                )
            (gradient,) = torch.autograd.grad(details(y, images.shape[-1], window), leaf)
        total += (after - before) * gradient
    maps = total.abs().sum(1)  # (b y x)
    field = (maps / maps.amax((1, 2), keepdim=True).clamp(min=1e-30)).mean(0)
    spread = sum(100 * (1 - gini(m)) for m in maps) / len(maps)
    return Attribution(
        field / field.max().clamp(min=1e-30), spread, {k: centred_share(field, k / 100) for k in (50, 95, 99)}
    )


def details(y: Tensor, side: int, window: int) -> Tensor:
    """Sum of |differences| to the right and below in the window, scaled to the restored size (b c y x)."""
    scale = y.shape[-1] // side
    half, rows, columns = window * scale // 2, y.shape[-2] // 2, y.shape[-1] // 2
    part = y[..., rows - half : rows + half, columns - half : columns + half]
    return part.diff(dim=-1).abs().sum() + part.diff(dim=-2).abs().sum()


def gini(values: Tensor) -> float:
    """0 for equal values, towards 1 where one of them is everything."""
    ordered = values.flatten().double().sort().values
    n = len(ordered)
    weights = 2 * torch.arange(1, n + 1, dtype=torch.float64) - n - 1
    return float((weights * ordered).sum() / (n * ordered.sum()).clamp(min=1e-30))


def probe(subject):
    """The map over all given pictures."""
    from ssmzoo.probes.subject import Finding

    found = local_attribution(subject.model, subject.inputs)
    finding, title = Finding({"diffusion index": f"{found.diffusion:.2f}"}), "local attribution of the middle"
    show_field(finding, "local_attribution", found.map, found.shares, "picture", title, "attribution")
    return finding
