"""What every source of dense annotations gives: pictures, a class per pixel, objects with boxes and masks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

IGNORED = -1  # the class of pixels that nothing is said of


@dataclass
class Objects:
    """boxes (n 4) float32, x0 y0 x1 y1 in pixels; labels (n) from 0; masks (n y x) of 0 and 1; crowd (n) bool"""

    boxes: np.ndarray
    labels: np.ndarray
    masks: np.ndarray
    crowd: np.ndarray = None

    def __post_init__(self):
        if self.crowd is None:
            self.crowd = np.zeros(len(self.labels), dtype=bool)

    def __len__(self) -> int:
        return len(self.labels)


@dataclass
class Scene:
    """image (y x 3) uint8; classes (y x) int64 with IGNORED, or None; objects, or None; a name for messages"""

    name: str
    image: np.ndarray
    classes: np.ndarray | None = None
    objects: Objects | None = None


@dataclass
class Scenes:
    """One side of a source: `read(index, seed)` -> Scene; `seed` matters to sources that draw.

    classes       names; of segmentation by id (background included), of objects by label
    fingerprint   changes when the data does;  occupied  indices of pictures with objects (None: all)
    notes         what a user should know about the source, in words
    """

    name: str
    count: int
    read: Callable[[int, int], Scene]
    classes: list[str]
    fingerprint: str
    occupied: list[int] | None = None
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return self.count


def painted(objects: Objects, height: int, width: int) -> np.ndarray:
    """(y x) int64 classes of objects: 0 is background, label + 1 an object, larger ones first; crowds are IGNORED."""
    classes = np.zeros((height, width), dtype=np.int64)
    for i in np.argsort(-objects.masks.reshape(len(objects), -1).sum(1), kind="stable"):
        classes[objects.masks[i] > 0] = IGNORED if objects.crowd[i] else objects.labels[i] + 1
    return classes


def boxes_of(masks: np.ndarray) -> np.ndarray:
    """(n y x) masks, none empty -> (n 4) float32 tight boxes; x1 and y1 lie behind the last pixel"""
    boxes = np.zeros((len(masks), 4), dtype=np.float32)
    for box, mask in zip(boxes, masks):
        ys, xs = np.nonzero(mask)
        box[:] = xs.min(), ys.min(), xs.max() + 1, ys.max() + 1
    return boxes
