"""Scenes that need no download: real handwritten digits pasted on crops of the embedded photographs.

    image = (1 - alpha) dimmed crop + alpha colour          alpha the digit's ink, enlarged; 0.5 is its edge

Masks and boxes are exact. Training and validation share no digit and no photograph. Every training scene is drawn anew.
"""

from __future__ import annotations

import functools

import numpy as np

from ssmzoo.data.dense.scene import Objects, Scene, Scenes, boxes_of, painted
from ssmzoo.data.image_sources import digits
from ssmzoo.data.photos import EMBEDDED_TRAIN, EMBEDDED_VAL, embedded_photo

LONGEST = 512  # photographs are reduced to this side, so that a crop shows something
DIMMED = 0.6  # brightness that is left to photographs
CONTRAST = 0.3  # by which a digit's colour is lighter than the crop behind it, in luma from 0 to 1
LUMA = np.array([0.299, 0.587, 0.114])


@functools.lru_cache(maxsize=16)
def photograph(name: str) -> np.ndarray:
    """(y x 3) uint8, at most LONGEST pixels long"""
    from PIL import Image

    picture = Image.fromarray(embedded_photo(name))
    picture.thumbnail((LONGEST, LONGEST))
    return np.asarray(picture.convert("RGB"))


def background(rng: np.random.Generator, names: tuple[str, ...], size: int) -> np.ndarray:
    """(size size 3) float in [0, 1]: a random square of a photograph, turned over at random."""
    from PIL import Image

    photo = photograph(names[rng.integers(len(names))])
    limit = min(photo.shape[:2])
    side = int(rng.integers(min(limit, max(size // 2, 32)), limit + 1))
    y, x = (int(rng.integers(n - side + 1)) for n in photo.shape[:2])
    crop = Image.fromarray(photo[y : y + side, x : x + side]).resize((size, size), Image.BILINEAR)
    levels = np.asarray(crop, dtype=np.float32) * (DIMMED / 255)
    return levels[:, ::-1].copy() if rng.random() < 0.5 else levels.copy()


def ink(digit: np.ndarray, side: int) -> np.ndarray:
    """(8 8) levels 0 to 255 -> (side side) float alpha in [0, 1]"""
    from PIL import Image

    large = np.asarray(Image.fromarray(digit).resize((side, side), Image.BICUBIC), dtype=np.float32)
    return np.clip((large / 255 - 0.2) * 2.0, 0, 1)


def colour(rng: np.random.Generator, behind: np.ndarray) -> np.ndarray:
    """(3) in [0, 1], lighter than what is behind (... 3)."""
    luma = float(behind.reshape(-1, 3).mean(0) @ LUMA)
    while True:
        drawn = rng.random(3)
        if float(drawn @ LUMA) - luma >= CONTRAST:
            return drawn.astype(np.float32)


def draw_scene(seed: int, levels: np.ndarray, labels: np.ndarray, photos: tuple[str, ...], size: int) -> Scene:
    """A scene of two to four digits, as far as they find room; levels (n 8 8) uint8."""
    rng = np.random.default_rng(seed)
    image, masks, found = background(rng, photos, size), [], []
    for _ in range(int(rng.integers(2, 5))):
        i, side = int(rng.integers(len(labels))), int(rng.integers(size // 3, size * 9 // 20 + 1))
        alpha = ink(levels[i], side)
        place = free_place(rng, masks, alpha, size)
        if place is None or not (alpha > 0.5).any():
            continue
        y, x = place
        behind = image[y : y + side, x : x + side]
        ours = colour(rng, behind)
        image[y : y + side, x : x + side] = behind * (1 - alpha[..., None]) + ours * alpha[..., None]
        mask = np.zeros((size, size), dtype=np.uint8)
        mask[y : y + side, x : x + side] = alpha > 0.5
        masks.append(mask)
        found.append(labels[i])
    stack = np.stack(masks) if masks else np.zeros((0, size, size), dtype=np.uint8)
    objects = Objects(boxes_of(stack), np.array(found, dtype=np.int64), stack)
    return Scene(f"scene {seed}", (image * 255).round().astype(np.uint8), painted(objects, size, size), objects)


def free_place(rng: np.random.Generator, masks: list[np.ndarray], alpha: np.ndarray, size: int):
    """(y, x) of a corner where no other digit is covered; None when twenty tries find none."""
    side, taken = len(alpha), np.any(masks, axis=0) if masks else None
    for _ in range(20):
        y, x = (int(v) for v in rng.integers(0, size - side + 1, 2))
        if taken is None or not (taken[y : y + side, x : x + side] & (alpha > 0.05)).any():
            return y, x
    return None


def digit_scenes(size: int, train: int, val: int, val_fraction: float, split_seed: int) -> tuple[Scenes, Scenes]:
    """(training, validation): `train` scenes an epoch, drawn anew by seed, and `val` that are always the same."""
    sides = []
    for which, (images, photos, count) in enumerate(
        zip(digits(val_fraction, split_seed), (EMBEDDED_TRAIN, EMBEDDED_VAL), (train, val))
    ):
        levels = np.stack([np.asarray(images.read(i)) for i in range(len(images))])
        read = functools.partial(_read, which, levels, images.labels, photos, size)
        fingerprint = f"{images.fingerprint}-{size}-{train}-{val}"
        sides.append(Scenes("digits on photographs", count, read, list(images.classes), fingerprint))
    return sides[0], sides[1]


def _read(which: int, levels, labels, photos, size: int, index: int, seed: int) -> Scene:
    return draw_scene(seed if which == 0 else 2**40 + index, levels, labels, photos, size)
