"""Classes of pictures, with probabilities, from any classifier of the zoo."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from ssmzoo.data.image_file import ImageError, read_image8
from ssmzoo.inference.subject import Subject
from ssmzoo.terminal import caption


@dataclass(frozen=True)
class Prediction:
    """The most likely classes of a picture, the likeliest first."""

    file: str
    classes: list[str]
    probabilities: list[float]


def transform_of(subject: Subject) -> Callable:
    """PIL image -> (c y x) float, prepared as in validation: resized, centre crop, normalised."""
    from ssmzoo._torchvision import make_importable

    try:
        make_importable()
        from timm.data import create_transform
    except ImportError:
        raise ValueError("preparing pictures needs timm: pip install timm") from None
    picture, channels = subject.picture, channels_of(subject)
    return create_transform(
        (channels, picture.size, picture.size),
        **{"interpolation": picture.interpolation, "crop_pct": picture.crop, "mean": picture.mean, "std": picture.std},
    )


def channels_of(subject: Subject) -> int:
    return 1 if len(subject.picture.mean) == 1 else 3


def read_batches(
    subject: Subject, files: Iterable[Path], batch: int, failed: Callable[[ImageError], None] | None = None
) -> Iterator[tuple[list[Path], Tensor]]:
    """(files, images (b c y x)) of at most `batch`; `failed` is called for unreadable files, or they raise."""
    transform, mode = transform_of(subject), "L" if channels_of(subject) == 1 else "RGB"
    names: list[Path] = []
    images: list[Tensor] = []
    for file in files:
        try:
            images.append(transform(read_image8(file).convert(mode)))
        except ImageError as error:
            if failed is None:
                raise
            failed(error)
            continue
        names.append(file)
        if len(names) == batch:
            yield names, torch.stack(images)
            names, images = [], []
    if names:
        yield names, torch.stack(images)


@torch.inference_mode()
def predict(
    subject: Subject, files: Iterable[Path], top: int = 5, batch: int = 32, failed=None
) -> Iterator[Prediction]:
    """Yield the `top` most likely classes of each picture file, in order.

    failed  called with the ImageError of a file that cannot be read; None: it is raised

    Raises ValueError for a model that is no classifier of images.
    """
    if getattr(subject.model, "num_classes", 0) < 2 or not hasattr(subject.model, "forward_features"):
        raise ValueError(f"{subject.name} holds a {type(subject.model).__name__}, which does not classify pictures")
    if top < 1 or batch < 1:
        raise ValueError(f"top is {top} and batch {batch}; both must be at least 1")
    device = next(subject.model.parameters()).device
    for names, images in read_batches(subject, files, batch, failed):
        share, index = subject.model(images.to(device)).float().softmax(-1).cpu().sort(descending=True)
        for name, p, i in zip(names, share[:, :top].tolist(), index[:, :top].tolist()):
            yield Prediction(str(name), [subject.class_name(c) for c in i], p)


def write_table(found: list[Prediction], path: Path) -> None:
    """As .csv (a row per picture and rank) or .json. Raises ValueError for another suffix."""
    if path.suffix == ".json":
        path.write_text(json.dumps([asdict(p) for p in found], indent=1) + "\n", encoding="utf-8")
    elif path.suffix == ".csv":
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["file", "rank", "class", "probability"])
            for p in found:
                rows = zip(p.classes, p.probabilities)
                writer.writerows([p.file, rank, name, f"{share:.6f}"] for rank, (name, share) in enumerate(rows, 1))
    else:
        raise ValueError(f"{path} must end in .csv or .json")


def draw_sheet(found: list[Prediction], png: Path, columns: int = 6, limit: int = 60) -> Path:
    """A contact sheet: thumbnails with the likeliest class and its probability."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = found[:limit]
    columns = min(columns, len(shown))
    rows = -(-len(shown) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(2 * columns, 2.3 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for axis, p in zip(axes.flat, shown):
        image = read_image8(p.file)
        image.thumbnail((256, 256))
        axis.imshow(image.convert("RGB"))
        words = f"{p.classes[0]:.24} {100 * p.probabilities[0]:.0f} %\n{Path(p.file).name:.24}"
        axis.set_title(caption(words), fontsize=7)
    if len(found) > limit:
        figure.suptitle(f"the first {limit} of {len(found)} pictures", fontsize=9)
    figure.savefig(png, dpi=120)
    plt.close(figure)
    return png
