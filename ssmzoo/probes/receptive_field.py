"""Effective receptive field of an image model: which pixels move the feature in the middle of the last map.

    ERF(pixel) = mean over images and output channels' signs of |d sum of the central feature / d pixel|

Of a restoration model that offers no features the centre of the restored image stands for it.

Source: Luo et al. 2016 (arXiv 1701.04128), as VMamba (arXiv 2401.10166) plots it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ssmzoo.probes.image_tokens import patch_grid, special_tokens


class Field(NamedTuple):
    """map (y x), largest value 1 | shares: side of the smallest centred square with 50, 75, 95 and 99 % of the whole,
    over the side of the image."""

    map: Tensor
    shares: dict[int, float]


def receptive_field(model: nn.Module, images: Tensor) -> Field:
    """images (b c y x); the model offers forward_features, or returns images."""
    refusal = (
        f"{type(model).__name__} and an input {tuple(images.shape)}: a receptive field needs an image model, with "
        f"forward_features or images as its output, and images (batch, channels, height, width)"
    )
    if images.ndim != 4 or not images.is_floating_point():
        raise ValueError(refusal)
    leaf = images.detach().requires_grad_()
    with torch.enable_grad():
        features = model.forward_features(leaf) if hasattr(model, "forward_features") else model(leaf)
        if not isinstance(features, Tensor) or features.ndim not in (3, 4):
            raise ValueError(refusal)
        middle = central_feature(model, features, images.shape[-2:])
        (gradient,) = torch.autograd.grad(middle.relu().sum(), leaf)
    field = gradient.abs().sum(1).mean(0)
    field = field / field.max().clamp(min=1e-30)
    return Field(field, {share: centred_share(field, share / 100) for share in (50, 75, 95, 99)})


def central_feature(model: nn.Module, features: Tensor, size: torch.Size) -> Tensor:
    """(b c): of a map (b c y x), or of a sequence (b l c) with class tokens among its patches."""
    if features.ndim == 3:
        special = set(special_tokens(model, features.shape[1]))
        patches = [i for i in range(features.shape[1]) if i not in special]
        rows, columns = patch_grid(model, *size)
        return features[:, patches[rows // 2 * columns + columns // 2]]
    if getattr(model, "output_fmt", "NCHW") == "NHWC":  # timm's word for channels-last maps
        features = features.permute(0, 3, 1, 2)
    return features[:, :, features.shape[2] // 2, features.shape[3] // 2]


def centred_share(field: Tensor, share: float) -> float:
    """Side of the smallest centred square with `share` of the sum, over the longer side of the field."""
    y, x = field.shape
    total, longest = field.sum(), max(y, x)
    for half in range(1, longest // 2 + 2):
        part = field[max(0, y // 2 - half) : y // 2 + half, max(0, x // 2 - half) : x // 2 + half]
        if float(part.sum()) >= share * float(total):
            return min(1.0, 2 * half / longest)
    return 1.0


def show_field(finding, name: str, field: Tensor, shares: dict[int, float], of: str, title: str, quantity: str) -> None:
    """Shares and the map `name` (y x; largest value 1) of pictures called `of`, added to a finding."""
    from ssmzoo.probes import figures

    finding.summary |= {
        f"side of the centred square with {share} % (share of the {of}'s side)": f"{side:.3f}"
        for share, side in shares.items()
    }
    finding.tables["shares"] = (("share (%)", "side"), [(k, f"{v:.4f}") for k, v in shares.items()])
    figure, axes = figures.canvas(1, 1, (4.2, 3.6))
    label = f"log10 |{quantity}|, largest = 0"
    figures.heat(figure, axes[0, 0], (field + 1e-6).log10(), "x (pixels)", "y (pixels)", title, label=label)
    finding.figures[name] = figure


def probe(subject):
    """The field over all given images."""
    from ssmzoo.probes import figures
    from ssmzoo.probes.subject import Finding

    field, finding = receptive_field(subject.model, subject.inputs), Finding({})
    show_field(finding, "receptive_field", *field, "image", "effective receptive field", "gradient")
    maps = activations(subject.model, subject.inputs[:1])
    if maps:
        figure, axes = figures.canvas(1, len(maps), (2.6, 2.4))
        for i, (axis, values) in enumerate(zip(axes.flat, maps)):
            figures.heat(
                figure,
                axis,
                values,
                "x",
                "y",
                f"feature {i}, {values.shape[0]}x{values.shape[1]}",
                label="mean |activation|",
            )
        finding.figures["activations"] = figure
    return finding


@torch.no_grad()
def activations(model: nn.Module, image: Tensor, most: int = 4) -> list[Tensor]:
    """Mean absolute value over channels (y x) of up to `most` feature maps of one image (1 c y x), evenly by depth."""
    if not hasattr(model, "forward_intermediates"):
        return []
    count = len(model.feature_info)
    chosen = sorted({count * (i + 1) // most - 1 for i in range(most)} - {-1})
    return [m[0].abs().mean(0) for m in model.forward_intermediates(image, indices=chosen, intermediates_only=True)]
