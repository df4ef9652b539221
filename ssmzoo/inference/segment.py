"""Classes of pixels by a `Segmenter`: of whole pictures, in windows that slide, at several scales.

    whole     the picture at once
    slide     windows of `crop` pixels every `stride`, the last ones moved back inside; logits averaged over them
    scales    the mean over scales (and mirror images) of the softmax, each brought back to the picture's size

b batch, k classes, y x rows and columns. Source: the protocols of mmsegmentation, in which published mIoU is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def windows(length: int, crop: int, stride: int) -> list[int]:
    """Where windows of `crop` begin so that they cover `length`."""
    if length <= crop:
        return [0]
    return [min(i * stride, length - crop) for i in range(-(-(length - crop) // stride) + 1)]


def slide(logits_of: Callable[[Tensor], Tensor], x: Tensor, crop: int, stride: int) -> Tensor:
    """(b c y x) -> logits (b k y x), averaged over the windows that see a pixel."""
    total, seen = None, x.new_zeros(x.shape[2:])
    for top in windows(x.shape[2], crop, stride):
        for left in windows(x.shape[3], crop, stride):
            ys, xs = slice(top, top + crop), slice(left, left + crop)
            found = logits_of(x[:, :, ys, xs])
            total = found.new_zeros(len(x), found.shape[1], *x.shape[2:]) if total is None else total
            total[:, :, ys, xs] += found
            seen[ys, xs] += 1
    return total / seen


def class_scores(
    model,
    x: Tensor,
    size: Sequence[int] | None = None,
    window: Sequence[int] | None = None,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
) -> Tensor:
    """Scores (b k *size) whose largest names the class: logits, or mean probabilities with `scales` or `flip`.

    x       (b c y x), prepared as in validation;  size  of the result, (y, x) of x unless given
    window  (crop, stride) in pixels, or None for whole pictures
    """
    size = tuple(size or x.shape[2:])

    def once(image: Tensor) -> Tensor:
        found = model.segment(image) if window is None else slide(model.segment, image, *window)
        return F.interpolate(found, size, mode="bilinear", align_corners=False) if found.shape[2:] != size else found

    if list(scales) == [1.0] and not flip:
        return once(x)
    total, count = torch.zeros(()), 0
    for scale in scales:
        scaled = [max(1, round(side * scale)) for side in x.shape[2:]]
        image = x if scale == 1 else F.interpolate(x, scaled, mode="bilinear", align_corners=False)
        for mirrored in (False, True) if flip else (False,):
            found = once(image.flip(3) if mirrored else image).float().softmax(1)
            total, count = total.to(found) + (found.flip(3) if mirrored else found), count + 1
    return total / count
