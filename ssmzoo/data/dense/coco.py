"""COCO's instance annotations: a JSON file of images, categories and objects as polygons or run lengths.

    <path>/annotations/instances_train2017.json  instances_val2017.json        (any names with train and val in them)
    <path>/train2017/*.jpg  val2017/*.jpg        pictures where `file_name` says, or below the folder of that side

Boxes are [x, y, width, height]. A polygon's pixels are those whose centres lie inside; run lengths go down the columns,
starting with zeros, as numbers or as COCO's compressed string. Crowds are no objects to be found: in segmentation their
pixels are ignored, in detection they are left out.
"""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from ssmzoo.data.dense.masks import held_out
from ssmzoo.data.dense.scene import Objects, Scene, Scenes, painted
from ssmzoo.data.image_file import SUFFIXES, read_image8

SLACK = 1.0  # pixels by which a box may leave its picture: rounding in COCO's own files


def run_lengths(text: str) -> list[int]:
    """COCO's compressed string: 5 bits a character, the sixth says that more follow; from the third on differences."""
    counts, i = [], 0
    while i < len(text):
        value, shift, more = 0, 0, True
        while more:
            c = ord(text[i]) - 48
            value |= (c & 31) << shift
            more, i, shift = bool(c & 32), i + 1, shift + 5
        if c & 16:
            value -= 1 << shift
        counts.append(value + counts[-2] if len(counts) > 2 else value)
    return counts


def decoded(segmentation: Any, height: int, width: int) -> np.ndarray:
    """(y x) of 0 and 1 of polygons [[x y x y ...], ...] or of {"counts", "size"}."""
    if isinstance(segmentation, dict):
        counts = segmentation["counts"]
        counts = run_lengths(counts) if isinstance(counts, str) else counts
        flat = np.repeat(np.arange(len(counts)) % 2, counts)
        if list(segmentation["size"]) != [height, width] or flat.size != height * width:
            raise ValueError(f"run lengths of {flat.size} pixels for a picture of {width}x{height}")
        return flat.reshape(width, height).T.astype(np.uint8)
    try:
        from skimage.draw import polygon as filled
    except ImportError:
        raise ValueError("polygons need scikit-image: pip install scikit-image") from None
    mask = np.zeros((height, width), dtype=np.uint8)
    for polygon in segmentation:
        if len(polygon) >= 6:
            points = np.asarray(polygon, dtype=np.float64).reshape(-1, 2) - 0.5  # pixel 0 has its centre at 0.5
            mask[filled(points[:, 1], points[:, 0], (height, width))] = 1
    return mask


def read_coco(file: Path) -> dict[str, Any]:
    """The parsed file. Raises ValueError for one that is no COCO annotation or contradicts itself."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as JSON: {error}") from None
    lacking = [k for k in ("images", "annotations", "categories") if not isinstance(content, dict) or k not in content]
    if lacking:
        raise ValueError(f"{file} is no COCO annotation of objects: it lacks {', '.join(lacking)}")
    known = {c["id"] for c in content["categories"]}
    unknown = sorted({a["category_id"] for a in content["annotations"]} - known)
    if unknown:
        raise ValueError(f"{file}: annotations name the category ids {unknown[:5]}, which `categories` does not list")
    pictures = {i["id"] for i in content["images"]}
    strays = [a for a in content["annotations"] if a["image_id"] not in pictures]
    if strays:
        raise ValueError(
            f"{file}: annotation {strays[0].get('id')} belongs to image {strays[0]['image_id']}, which is not there"
        )
    return content


def box_problem(box: list[float], width: int, height: int) -> str:
    """What is wrong with a box [x y w h], in words; '' when nothing is."""
    if len(box) != 4 or box[2] <= 0 or box[3] <= 0:
        return "has no area"
    if min(box[:2]) < -SLACK or box[0] + box[2] > width + SLACK or box[1] + box[3] > height + SLACK:
        return f"leaves its picture of {width}x{height} pixels"
    return ""


def coco_side(file: Path, folders: list[Path], broken: str, semantic: bool, classes: list[str] | None = None) -> Scenes:
    """The pictures of one JSON file; `folders` are searched for them. broken: "refuse" or "skip" impossible boxes."""
    content = read_coco(file)
    categories = sorted(content["categories"], key=lambda c: c["id"])
    names = [str(c["name"]) for c in categories]
    if classes is not None and names != classes:
        raise ValueError(f"{file} has other categories than the training file: {names[:5]} instead of {classes[:5]}")
    label = {c["id"]: i for i, c in enumerate(categories)}
    by_image: dict[int, list[dict]] = {i["id"]: [] for i in content["images"]}
    size = {i["id"]: (i["width"], i["height"]) for i in content["images"]}
    bad = []
    for a in content["annotations"]:
        problem = box_problem(a.get("bbox", ()), *size[a["image_id"]])
        if problem:
            bad.append(f"annotation {a.get('id')}: the box {a.get('bbox')} {problem}")
        else:
            kept = {k: a.get(k) for k in ("id", "bbox", "segmentation")}
            by_image[a["image_id"]].append(kept | {"label": label[a["category_id"]], "crowd": bool(a.get("iscrowd"))})
    if bad and broken == "refuse":
        raise ValueError(f"{file}: {len(bad)} impossible boxes; {bad[0]}; mend them, or set data.broken=skip")
    notes = [f"{len(bad)} impossible boxes of {file.name} were left out; {bad[0]}"] if bad else []
    records = [(find_picture(i["file_name"], folders, file), i["id"], size[i["id"]]) for i in content["images"]]
    counts = np.bincount([a["label"] for objects in by_image.values() for a in objects], minlength=len(names))
    if absent := [n for n, c in zip(names, counts) if c == 0]:
        notes.append(f"{len(absent)} of {len(names)} classes never occur in {file.name}: {', '.join(absent[:5])}")
    occupied = [n for n, (_, i, _) in enumerate(records) if any(not a["crowd"] for a in by_image[i])]
    read = functools.partial(read_record, records, by_image, semantic)
    fingerprint = hashlib.sha256(file.read_bytes()).hexdigest()
    named = ["background", *names] if semantic else names
    return Scenes(str(file), len(records), read, named, fingerprint, occupied, notes)


def find_picture(name: str, folders: list[Path], file: Path) -> Path:
    found = next((f / name for f in folders if (f / name).is_file()), None)
    if found is None or found.suffix.lower() not in SUFFIXES or ".." in Path(name).parts:
        raise ValueError(f"{file}: the picture {name} is in none of {', '.join(map(str, folders))}")
    return found


def read_record(records: list, by_image: dict, semantic: bool, index: int, seed: int) -> Scene:
    """Picture number `index` with its objects. Raises ValueError where file and annotation disagree."""
    path, key, (width, height) = records[index]
    image = np.asarray(read_image8(path).convert("RGB"))
    if image.shape[:2] != (height, width):
        raise ValueError(f"{path} has {image.shape[1]}x{image.shape[0]} pixels, its annotation says {width}x{height}")
    found = by_image[key]
    masks = np.zeros((len(found), height, width), dtype=np.uint8)
    for mask, a in zip(masks, found):
        try:
            mask[:] = decoded(a["segmentation"] or box_polygon(a["bbox"]), height, width)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise ValueError(f"{path.name}: annotation {a['id']} has no readable segmentation: {error}") from None
    boxes = np.array([a["bbox"] for a in found], dtype=np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    boxes = boxes.clip(0, [width, height, width, height]).astype(np.float32)
    labels = np.array([a["label"] for a in found], dtype=np.int64)
    objects = Objects(boxes, labels, masks, np.array([a["crowd"] for a in found], dtype=bool))
    return Scene(path.name, image, painted(objects, height, width) if semantic else None, objects)


def box_polygon(box: list[float]) -> list[list[float]]:
    """Of an annotation that has a box only."""
    x, y, w, h = box
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def coco_files(path: str) -> list[Path]:
    """JSON files of annotations below a folder, or the file itself; [] where there is none."""
    root = Path(path).expanduser()
    if root.is_file() and root.suffix == ".json":
        return [root]
    places = (root / "annotations", root)
    return next((found for place in places if (found := sorted(place.glob("*.json")))), [])


def coco(
    path: str, val_path: str | None, broken: str, semantic: bool, val_fraction: float, seed: int
) -> tuple[Scenes, Scenes]:
    """(training, validation) of COCO's layout, or of a JSON file beside its pictures. Raises ValueError."""
    files = [f for f in coco_files(path) if not any(w in f.name for w in ("captions", "keypoints", "panoptic"))]
    train = next((f for f in files if "train" in f.name), files[0] if files else None)
    val = next((f for f in files if "val" in f.name and f != train), None)
    if val_path is not None:
        val = next(iter(coco_files(val_path)), None)
    if train is None or (val is None and val_path is not None):
        raise ValueError(f"no COCO annotation (*.json) at {path if train is None else val_path}")
    first = coco_side(train, folders_of(train), broken, semantic)
    if val is not None:
        second = coco_side(val, folders_of(val), broken, semantic, first.classes[1:] if semantic else first.classes)
        return first, second
    own, out = held_out([(Path(str(i)), i) for i in range(len(first))], val_fraction, seed)
    return tuple(chosen(first, [i for _, i in side]) for side in (own, out))


def chosen(scenes: Scenes, indices: list[int]) -> Scenes:
    """Some of the pictures."""
    position = {index: n for n, index in enumerate(indices)}
    occupied = [position[i] for i in scenes.occupied if i in position]
    read = functools.partial(_read_chosen, scenes.read, indices)
    return Scenes(scenes.name, len(indices), read, scenes.classes, scenes.fingerprint, occupied, scenes.notes)


def _read_chosen(read, indices: list[int], index: int, seed: int) -> Scene:
    return read(indices[index], seed)


def folders_of(file: Path) -> list[Path]:
    """Where the pictures of an annotation file may lie: beside it, and in the folder of its side (train2017)."""
    root = file.parent.parent if file.parent.name == "annotations" else file.parent
    side = file.stem.rpartition("_")[2]
    return [root / side, root / "images" / side, root / "images", root, file.parent]
