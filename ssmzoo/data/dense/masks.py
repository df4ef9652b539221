"""Folders of pictures and masks: any with images/ and masks/ inside, ADE20K's scene parsing layout among them.

    <path>/images/.../NAME.jpg        <path>/masks/.../NAME.png      (or annotations, labels, SegmentationClass)
    <path>/images/train  val          the same split below masks; without one a share is held out by name
    <path>/train/images  val/images   the other way round

A mask holds an id per pixel: a PNG with a palette, of 1 to 8 bits, or of 16 bits. `ignore` (255) stands for pixels that
nothing is said of; with `reduce_zero_label` (ADE20K) 0 does too and the ids begin at 1. Names of classes, one a line,
may lie in <path>/classes.txt (or ADE20K's objectInfo150.txt).
"""

from __future__ import annotations

import functools
import hashlib
import re
from pathlib import Path

import numpy as np

from ssmzoo.data.dense.scene import IGNORED, Scene, Scenes
from ssmzoo.data.image_file import ImageError, find_pictures, read_image8

IMAGES = ("images", "image", "imgs", "JPEGImages")
MASKS = ("masks", "annotations", "labels", "mask", "SegmentationClass")
TRAIN, VAL = ("train", "training"), ("val", "validation", "valid", "test")
ADE20K_CLASSES = 150
SHOWN = 5


def read_ids(path: Path) -> np.ndarray:
    """(y x) int64 ids of a mask. Raises ImageError for a file that is none, and for colour pictures."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            raw = image.tile[0].args if image.tile else None
            raw = raw[0] if isinstance(raw, tuple) else raw
            if image.mode not in ("1", "L", "P", "I", "I;16", "I;16B", "I;16L"):
                raise ImageError(
                    f"{path} is a picture of mode {image.mode}; a mask holds one id per pixel: a PNG with a palette, "
                    f"or grey of 8 or 16 bits"
                )
            ids = np.asarray(image).astype(np.int64)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        if isinstance(error, ImageError):
            raise
        raise ImageError(f"{path} cannot be read as a mask (damaged or cut off, or of another kind)") from None
    return ids // {"L;2": 85, "L;4": 17}.get(raw, 1)  # Pillow stretches grey of 2 and 4 bits to 8


def pairs(images: Path, masks: Path) -> list[tuple[Path, Path]]:
    """Every picture below `images` with the mask of the same name, any suffix."""

    def named(folder: Path) -> dict[str, Path]:
        return {f.relative_to(folder).with_suffix("").as_posix(): f for f in find_pictures(folder)}

    pictures, ids = named(images), named(masks)
    missing = [name for name in pictures if name not in ids]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(pictures)} pictures in {images} have no mask of the same name in {masks}: "
            f"{', '.join(missing[:SHOWN])}{' ...' if len(missing) > SHOWN else ''}"
        )
    return [(f, ids[name]) for name, f in pictures.items()]


def find_sides(root: Path) -> tuple[tuple[Path, Path], tuple[Path, Path] | None]:
    """((images, masks) of training, those of validation or None) below a folder."""

    def both(folder: Path) -> tuple[Path, Path] | None:
        found = [next((folder / n for n in names if (folder / n).is_dir()), None) for names in (IMAGES, MASKS)]
        return None if None in found else tuple(found)

    def below(folder: Path, names: tuple[str, ...]) -> Path | None:
        return next((folder / n for n in names if (folder / n).is_dir()), None)

    if whole := both(root):
        sides = [tuple(below(part, names) for part in whole) for names in (TRAIN, VAL)]
        train, val = (None if None in side else side for side in sides)
        return (train, val) if train else (whole, None)
    train, val = (both(side) if (side := below(root, names)) else None for names in (TRAIN, VAL))
    if train is None:
        raise ValueError(
            f"{root} has no pictures with masks: expected the folders {IMAGES[0]} and {MASKS[0]} (or "
            f"{', '.join(MASKS[1:])}) inside, or inside {TRAIN[0]} and {VAL[0]}; for COCO, annotations/*.json"
        )
    return train, val


def mask_folders(
    path: str,
    val_path: str | None = None,
    classes: int | list[str] | None = None,
    ignore: int = 255,
    reduce_zero_label: bool | None = None,
    val_fraction: float = 0.2,
    seed: int = 0,
) -> tuple[Scenes, Scenes]:
    """(training, validation) of a folder. classes: how many, or names; None: classes.txt, or the largest id found

    Raises ValueError for folders that are missing or do not pair; a mask's size and ids are checked when it is read.
    """
    root = Path(path).expanduser()
    if not root.is_dir():
        raise ValueError(f"data.path = '{path}' is not a folder; give one that holds images and masks")
    train, val = find_sides(root)
    ade20k = train[0].name == "training" and train[1].parent.name == "annotations"
    train = pairs(*train)
    if val_path is not None:
        val = pairs(*find_sides(Path(val_path).expanduser())[0])
    elif val is not None:
        val = pairs(*val)
    else:
        train, val = held_out(train, val_fraction, seed)
    zero = ade20k if reduce_zero_label is None else reduce_zero_label
    named = class_names(root, classes, ADE20K_CLASSES if ade20k else None)
    if named is None:
        top = max(largest_id(mask, ignore) for _, mask in [*train, *val])
        named = [str(i) for i in range(max(2, top + 1 - zero))]
    return tuple(_scenes(root, side, named, ignore, zero) for side in (train, val))


def _scenes(root: Path, side: list[tuple[Path, Path]], classes: list[str], ignore: int, zero: bool) -> Scenes:
    sizes = "\n".join(f"{f.name} {f.stat().st_size} {m.stat().st_size}" for f, m in side)
    fingerprint = hashlib.sha256(sizes.encode("utf-8", "surrogateescape")).hexdigest()
    read = functools.partial(read_pair, side, len(classes), ignore, zero)
    return Scenes(str(root), len(side), read, classes, fingerprint)


def held_out(side: list, fraction: float, seed: int) -> tuple[list, list]:
    """(training, validation): a share is held out, by the hash of seed and name."""
    order = sorted(side, key=lambda pair: hashlib.sha256(f"{seed} {pair[0].name}".encode()).hexdigest())
    count = max(1, round(fraction * len(side)))
    if count >= len(side):
        raise ValueError(
            f"{len(side)} pictures leave none to train on when {count} are held out; give more, or val_path"
        )
    chosen = {id(pair) for pair in order[:count]}
    return [p for p in side if id(p) not in chosen], [p for p in side if id(p) in chosen]


def class_names(root: Path, given: int | list[str] | None, known: int | None) -> list[str] | None:
    """Names of the classes by what was typed, by a file in `root`, or numbers; None where nothing is known."""
    if isinstance(given, (list, tuple)):
        return [str(name) for name in given]
    found = None
    if (root / "classes.txt").is_file():
        found = [
            line.strip() for line in (root / "classes.txt").read_text(encoding="utf-8").splitlines() if line.strip()
        ]
    elif (root / "objectInfo150.txt").is_file():
        lines = (root / "objectInfo150.txt").read_text(encoding="utf-8").splitlines()
        found = [re.split(r"\s{2,}|\t", line.strip())[-1] for line in lines if line[:1].isdigit()]
    count = given or known
    if found is not None and count not in (None, len(found)):
        raise ValueError(f"data.classes = {count}, but the file of names in {root} has {len(found)}")
    return found if found is not None or count is None else [str(i) for i in range(count)]


def largest_id(mask: Path, ignore: int) -> int:
    ids = read_ids(mask)
    ids = ids[ids != ignore]
    return int(ids.max()) if ids.size else 0


def read_pair(side: list[tuple[Path, Path]], classes: int, ignore: int, zero: bool, index: int, seed: int) -> Scene:
    """Picture and mask number `index`. Raises ValueError for a mask of another size and for ids that no class has."""
    picture, mask = side[index]
    image = np.asarray(read_image8(picture).convert("RGB"))
    ids = read_ids(mask)
    if ids.shape != image.shape[:2]:
        raise ValueError(
            f"the mask {mask} has {ids.shape[1]}x{ids.shape[0]} pixels, its picture {picture.name} "
            f"{image.shape[1]}x{image.shape[0]}; they must be equal"
        )
    nothing = (ids == ignore) | (ids == 0 if zero else False)
    ids = np.where(nothing, IGNORED, ids - zero)
    if int(ids.max()) >= classes:
        wrong = sorted({int(i) + zero for i in np.unique(ids) if i >= classes})
        named = ", ".join(map(str, wrong[:SHOWN])) + (" ..." if len(wrong) > SHOWN else "")
        raise ValueError(
            f"the mask {mask} holds the ids {named}, "
            f"but there are {classes} classes ({zero:d} to {classes - 1 + zero}) and {ignore} for what is ignored; set "
            f"data.classes=<number or names>, or mend the mask"
        )
    return Scene(picture.name, image, ids)
