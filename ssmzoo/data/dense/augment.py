"""Augmentation of pictures together with what is drawn on them, by torchvision's transforms (v2).

Everything works on {"image": Image (3 y x) uint8, "classes": Mask (y x)} or on an image with "boxes" and "masks".
Random choices come from torch's generator.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ssmzoo.data.dense.scene import IGNORED, Scene

TRIES = 10  # crops drawn until one class does not fill it


def tools():
    """torchvision's (transforms.v2, tv_tensors), or a ValueError in words."""
    from ssmzoo._torchvision import make_importable

    try:
        make_importable()
        from torchvision import tv_tensors
        from torchvision.transforms import v2
    except ImportError:
        raise ValueError(
            "augmenting pictures with masks and boxes needs torchvision: pip install torchvision"
        ) from None
    return v2, tv_tensors


def sample_of(scene: Scene, objects: bool, crowds: bool = False) -> dict:
    """A scene as torchvision's tensors: classes per pixel, or objects, with the crowds among them or without."""
    _, tv = tools()
    image = tv.Image(torch.from_numpy(scene.image.copy()).permute(2, 0, 1).contiguous())
    if not objects:
        return {"image": image, "classes": tv.Mask(torch.from_numpy(scene.classes))}
    kept = ~scene.objects.crowd | crowds
    boxes = torch.from_numpy(scene.objects.boxes[kept]).reshape(-1, 4)
    return {
        "image": image,
        "boxes": tv.BoundingBoxes(boxes, format="XYXY", canvas_size=tuple(image.shape[1:])),
        "labels": torch.from_numpy(scene.objects.labels[kept]),
        "masks": tv.Mask(torch.from_numpy(scene.objects.masks[kept])),
    } | ({"crowd": torch.from_numpy(scene.objects.crowd)} if crowds else {})


def scale_to_fit(height: int, width: int, frame: Sequence[int]) -> float:
    """The factor that makes a picture fit into (long side, short side)."""
    return min(max(frame) / max(height, width), min(frame) / min(height, width))


def resized(sample: dict, factor: float) -> dict:
    v2, _ = tools()
    height, width = sample["image"].shape[1:]
    size = [max(1, round(height * factor)), max(1, round(width * factor))]
    return v2.Resize(size, antialias=True)(sample)


def random_crop(sample: dict, size: Sequence[int], max_share: float = 1.0) -> dict:
    """A crop of `size`, padded below and right (image 0, class IGNORED) where the picture is smaller. With classes, up
    to TRIES crops are drawn until no class has more than `max_share` of the labelled pixels."""
    v2, _ = tools()
    height, width = sample["image"].shape[1:]
    bottom, right = max(0, size[0] - height), max(0, size[1] - width)
    if bottom or right:
        fill = {"others": 0} if "classes" not in sample else {type(sample["classes"]): IGNORED, "others": 0}
        sample = v2.Pad([0, 0, right, bottom], fill=fill)(sample)
    crop = v2.RandomCrop(list(size))
    for _ in range(TRIES if "classes" in sample and max_share < 1 else 1):
        found = crop(sample)
        if "classes" not in found or share_of_largest(found["classes"]) < max_share:
            break
    return found


def share_of_largest(classes: Tensor) -> float:
    """Of the labelled pixels, the share that the most frequent class has; 0 without any, as of a class alone."""
    counts = torch.bincount(classes[classes != IGNORED].flatten())
    counts = counts[counts > 0]
    return float(counts.max() / counts.sum()) if len(counts) > 1 else 0.0 if len(counts) == 0 else 1.0


def for_segmentation(sample: dict, chosen: dict) -> dict:
    """resize and scale, crop, flip, photometric distortion, as far as `chosen` (see `SegmentationData`) has them."""
    v2, _ = tools()
    low, high = chosen.get("scale", (1.0, 1.0))
    factor = low + (high - low) * float(torch.rand(()))
    if chosen.get("resize"):
        factor *= scale_to_fit(*sample["image"].shape[1:], chosen["resize"])
    if factor != 1:
        sample = resized(sample, factor)
    if chosen.get("crop"):
        sample = random_crop(sample, (chosen["crop"],) * 2, chosen.get("max_share", 1.0))
    if chosen.get("hflip"):
        sample = v2.RandomHorizontalFlip(chosen["hflip"])(sample)
    return v2.RandomPhotometricDistort()(sample) if chosen.get("photometric") else sample


def for_detection(sample: dict, chosen: dict) -> dict:
    """flip, and in half of the cases another resize and a crop (DETR's), as `chosen` (see `DetectionData`) has them."""
    v2, _ = tools()
    if chosen.get("hflip"):
        sample = v2.RandomHorizontalFlip(chosen["hflip"])(sample)
    if chosen.get("crops") and torch.rand(()) < 0.5:
        short = (400, 500, 600)[int(torch.randint(3, ()))]
        sample = resized(sample, short / min(sample["image"].shape[1:]))
        sides = [min(side, int(torch.randint(384, 601, ()))) for side in sample["image"].shape[1:]]
        sample = random_crop(sample, sides)
    return v2.SanitizeBoundingBoxes(min_size=1.0, labels_getter=lambda s: (s["labels"], s["masks"]))(sample)
