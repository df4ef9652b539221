"""Two operators of torchvision's detectors in plain torch, for machines where its compiled ones cannot load.

    nms         of boxes in falling order of score, keep those that overlap with no kept one by more than the threshold
    roi_align   bilinear samples on a regular grid inside every box, averaged per cell

Both follow torchvision's documented behaviour; samples further than a pixel outside the map are 0, as in its compiled
kernels. Source: He et al. 2017 (arXiv 1703.06870), section 3; torchvision 0.28 (BSD-3).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """boxes (n 4), x0 y0 x1 y1, scores (n) -> indices of the kept boxes, the highest score first.

    Greedy suppression is the fixed point of: a box is kept iff no kept box of higher score overlaps it. Every round
    settles at least one more box; a handful of rounds is usual.
    """
    from torchvision.ops.boxes import box_iou

    order = scores.argsort(descending=True, stable=True)
    sorted_boxes = boxes.float()[order]
    above = torch.triu(box_iou(sorted_boxes, sorted_boxes) > iou_threshold, diagonal=1).float()
    keep = above.new_ones(len(order))
    while True:
        again = (keep @ above == 0).float()
        if torch.equal(again, keep):
            return order[keep > 0]
        keep = again


def roi_align(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
) -> Tensor:
    """input (b c y x), boxes (n 5) of image number and x0 y0 x1 y1, or one (n_i 4) per image -> (n c *output_size).

    sampling_ratio  samples per cell and side; -1: as many as the box has pixels per cell, rounded up
    aligned         shift by half a pixel, and let boxes be smaller than one
    """
    if not isinstance(boxes, Tensor):
        boxes = torch.cat([torch.cat([b.new_full((len(b), 1), i), b], 1) for i, b in enumerate(boxes)])
    size = (output_size,) * 2 if isinstance(output_size, int) else tuple(output_size)
    rois = boxes[:, [2, 1, 4, 3]].to(input.dtype) * spatial_scale - (0.5 if aligned else 0.0)  # y0 x0 y1 x1
    start, extent = rois[:, :2], rois[:, 2:] - rois[:, :2]
    extent = extent if aligned else extent.clamp(min=1)
    cell = extent / extent.new_tensor(size)
    ratio = cell.ceil().long().clamp(min=1) if sampling_ratio <= 0 else torch.full_like(cell, sampling_ratio).long()
    result = input.new_zeros(len(boxes), input.shape[1], *size)
    groups = torch.cat([boxes[:, :1].long(), ratio], 1)  # boxes of one image with one grid go together
    for group in groups.unique(dim=0) if len(boxes) else ():
        chosen = (groups == group).all(1).nonzero()[:, 0]
        image, (ry, rx) = input[int(group[0])], group[1:].tolist()
        result[chosen] = sampled(image, start[chosen], extent[chosen], size, ry, rx).to(result.dtype)
    return result


def sampled(image: Tensor, start: Tensor, extent: Tensor, size: Sequence[int], ry: int, rx: int) -> Tensor:
    """image (c y x), start and extent (n 2) in pixels -> (n c *size), each cell the mean of ry * rx samples."""
    n, coordinates = len(start), []
    for axis, (cells, r) in enumerate(zip(size, (ry, rx))):
        steps = (torch.arange(cells * r, device=image.device, dtype=image.dtype) + 0.5) / (cells * r)
        coordinates.append(start[:, axis, None] + steps * extent[:, axis, None])  # (n cells*r)
    ys, xs = coordinates
    inside = [(v >= -1) & (v <= side) for v, side in zip((ys, xs), image.shape[1:])]
    y, x = (v.clamp(0, side - 1) * 2 / max(side - 1, 1) - 1 for v, side in zip((ys, xs), image.shape[1:]))
    grid = torch.stack([x[:, None, :].expand(-1, ys.shape[1], -1), y[:, :, None].expand(-1, -1, xs.shape[1])], -1)
    values = F.grid_sample(image[None], grid.flatten(0, 1)[None], align_corners=True, padding_mode="border")
    values = values[0].unflatten(1, (n, -1)) * (inside[0][:, :, None] & inside[1][:, None, :])
    return F.avg_pool2d(values.transpose(0, 1), (ry, rx))


def use_where_missing() -> None:
    """Let torchvision's detectors call these two where its own compiled operators are not there."""
    from torchvision.extension import _has_ops

    if _has_ops():
        return
    import torchvision.models.detection.roi_heads as heads
    import torchvision.ops.boxes as box_module
    import torchvision.ops.poolers as poolers

    box_module.nms = nms
    poolers.roi_align = heads.roi_align = roi_align
