"""Masks and boxes on pictures, from a trained `Segmenter` or `Detector`: an overlay per picture, and the numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ssmzoo.data.image_file import ImageError, read_image8
from ssmzoo.inference.overlay import blended, box_lines, class_colours
from ssmzoo.inference.segment import class_scores
from ssmzoo.inference.subject import Subject
from ssmzoo.models.dense_network import DenseNetwork
from ssmzoo.models.segmenter import Segmenter


@dataclass(frozen=True)
class DensePrediction:
    """What was found in a picture: of a segmenter the classes' shares of its pixels, of a detector its objects.

    found     (name of the class, share or score, box x0 y0 x1 y1 in pixels or None), the largest first
    written   files that show it: the overlay, and of a segmenter the mask of ids
    """

    file: str
    found: list[tuple[str, float, list[float] | None]]
    written: list[str]


def is_dense(subject: Subject) -> bool:
    return isinstance(subject.model, DenseNetwork)


@torch.inference_mode()
def predict_dense(
    subject: Subject,
    files: Iterable[Path],
    folder: Path,
    size: int | None = None,
    min_score: float = 0.3,
    failed: Callable[[ImageError], None] | None = None,
) -> Iterator[DensePrediction]:
    """Yield what is found in each picture, drawn into `folder`.

    size       short side at which a segmenter sees pictures; None: that of its training, 0: their own
    min_score  objects below it are left out
    failed     called with the ImageError of a file that cannot be read; None: it is raised
    """
    if not 0 <= min_score <= 1 or (size or 0) < 0:
        raise ValueError(
            f"--min-score is {min_score} and --size {size}; a score lies in 0 to 1, a size is not negative"
        )
    folder.mkdir(parents=True, exist_ok=True)
    device, taken = next(subject.model.parameters()).device, set()
    for file in files:
        try:
            levels = np.asarray(read_image8(file).convert("RGB"))
        except ImageError as error:
            if failed is None:
                raise
            failed(error)
            continue
        image = torch.from_numpy(levels.copy()).permute(2, 0, 1).float().div(255).to(device)
        target = folder / f"{unused(file.stem, taken)}.png"
        if isinstance(subject.model, Segmenter):
            yield segmented(subject, file, image, levels, target, subject.picture.size if size is None else size)
        else:
            yield detected(subject, file, image, levels, target, min_score)


def unused(stem: str, taken: set[str]) -> str:
    """A name that no other picture of this call has."""
    name, number = stem, 2
    while name in taken:
        name, number = f"{stem}-{number}", number + 1
    taken.add(name)
    return name


def pixel_scores(subject: Subject, image: Tensor, side: int) -> Tensor:
    """(c y x) in [0, 1] -> (k y x) at its own size; a segmenter sees it with a short side of `side`, 0: as it is."""
    mean, std = (image.new_tensor(v).view(-1, 1, 1) for v in (subject.picture.mean, subject.picture.std))
    x, own = ((image - mean) / std)[None], image.shape[1:]
    if side:
        scaled = [max(1, round(s * side / min(own))) for s in own]
        x = F.interpolate(x, scaled, mode="bilinear", align_corners=False, antialias=True)
    return class_scores(subject.model, x, own)[0]


def segmented(
    subject: Subject, file: Path, image: Tensor, levels: np.ndarray, target: Path, side: int
) -> DensePrediction:
    from PIL import Image

    classes = pixel_scores(subject, image, side).argmax(0).cpu().numpy()
    colours = class_colours(subject.model.num_classes)
    Image.fromarray(blended(levels, classes, colours)).save(target)
    ids = Image.fromarray(classes.astype(np.uint8 if classes.max() < 256 else np.uint16))
    mask = target.with_name(f"{target.stem}_mask.png")
    if ids.mode == "L":
        ids.putpalette(np.resize(colours, (256, 3)).astype(np.uint8).tobytes())
    ids.save(mask)
    shares = np.bincount(classes.ravel(), minlength=subject.model.num_classes) / classes.size
    found = [(subject.class_name(int(c)), float(shares[c]), None) for c in np.argsort(-shares) if shares[c] > 0]
    return DensePrediction(str(file), found, [str(target), str(mask)])


def detected(
    subject: Subject, file: Path, image: Tensor, levels: np.ndarray, target: Path, min_score: float
) -> DensePrediction:
    objects = {k: v.cpu() for k, v in subject.model([image])[0].items()}
    keep = objects["scores"] >= min_score
    objects = {k: v[keep] for k, v in objects.items()}
    names = [subject.class_name(i) for i in range(subject.model.num_classes)]
    draw_objects(levels, objects, names, target)
    rows = zip(objects["labels"].tolist(), objects["scores"].tolist(), objects["boxes"].tolist())
    found = [(names[c], score, [round(v, 1) for v in box]) for c, score, box in rows]
    return DensePrediction(str(file), found, [str(target)])


def draw_objects(levels: np.ndarray, objects: dict, names: list[str], target: Path) -> None:
    """The picture in its own size (small ones enlarged to 400 pixels), boxes, names and outlines of masks over it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    height, width = levels.shape[:2]
    inches = max(1.0, 400 / max(height, width)) / 100
    figure = plt.figure(figsize=(width * inches, height * inches), dpi=100)
    axis = figure.add_axes((0, 0, 1, 1))
    axis.imshow(levels)
    axis.axis("off")
    box_lines(axis, objects, names, class_colours(len(names) + 1))
    axis.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
    figure.savefig(target)
    plt.close(figure)


def write_objects(found: list[DensePrediction], path: Path) -> None:
    """As .csv (a row per class or object) or .json."""
    if path.suffix == ".json":
        path.write_text(json.dumps([asdict(p) for p in found], indent=1) + "\n", encoding="utf-8")
        return
    import csv

    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "class", "share_or_score", "x0", "y0", "x1", "y1"])
        writer.writerows([p.file, c, f"{v:.6f}", *(box or [""] * 4)] for p in found for c, v, box in p.found)
