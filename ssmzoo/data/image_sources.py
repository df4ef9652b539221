"""Where labelled images come from: the digits of scikit-learn, folders with a class each, torchvision, Hugging Face.

Every source is a pair (train, validation) of `Images`; which image belongs to which side follows from a seed alone.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm")


@dataclass
class Images:
    """Labelled images. `read(i)` is a PIL image, `labels` (n) integers, `classes` and `files` their names."""

    name: str
    read: Callable[[int], Any]
    labels: np.ndarray
    classes: list[str]
    fingerprint: str
    files: list[str] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Sequence[int]) -> Images:
        indices = np.asarray(indices)
        files = None if self.files is None else [self.files[i] for i in indices]
        read = functools.partial(_read_chosen, self.read, indices)
        return Images(self.name, read, self.labels[indices], self.classes, self.fingerprint, files)


# Readers are functions of modules with bound arguments, for where data workers are sent their data set by pickle.
def _read_chosen(read: Callable[[int], Any], indices: np.ndarray, i: int):
    return read(int(indices[i]))


def _read_array(levels: np.ndarray, i: int):
    from PIL import Image

    return Image.fromarray(levels[i])


def _read_file(files: list[Path], i: int):
    return open_image(files[i])


def _read_column(data, column: int | str, i: int):
    return data[i][column]


def stratified_split(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(train, validation) indices: of every class, a random share of `fraction` (at least one image) is held out."""
    if not 0 < fraction < 1:
        raise ValueError(f"data.val_fraction = {fraction}; give a share between 0 and 1, such as 0.2")
    generator, held_out = np.random.default_rng(seed), []
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        held_out.extend(members[: max(1, round(fraction * len(members)))])
    held_out = np.sort(np.array(held_out))
    return np.setdiff1d(np.arange(len(labels)), held_out), held_out


def digits(val_fraction: float, seed: int) -> tuple[Images, Images]:
    """1,797 real handwritten digits of 8x8 pixels, 17 grey levels, which ship with scikit-learn."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ValueError(
            "the embedded digits need scikit-learn: pip install 'ssmzoo[vision]', or give "
            "data.path=<folder with one folder per class>"
        ) from None
    found = load_digits()
    levels = np.rint(found.images * (255 / 16)).astype(np.uint8)  # (1797 8 8)
    whole = from_arrays("scikit-learn digits", levels, found.target, [str(c) for c in found.target_names])
    train, val = stratified_split(whole.labels, val_fraction, seed)
    return whole.subset(train), whole.subset(val)


def from_arrays(name: str, levels: np.ndarray, labels: np.ndarray, classes: list[str]) -> Images:
    """levels (n y x) or (n y x 3) uint8, labels (n)"""
    fingerprint = hashlib.sha256(np.ascontiguousarray(levels).tobytes() + labels.astype(np.int64).tobytes()).hexdigest()
    return Images(name, functools.partial(_read_array, levels), labels.astype(np.int64), classes, fingerprint)


def folders(path: str, val_path: str | None, val_fraction: float, seed: int, broken: str) -> tuple[Images, Images]:
    """A folder per class under `path`; validation from val_path, from path/val beside path/train, or held out."""
    root = Path(path).expanduser()
    if not root.is_dir():
        raise ValueError(f"data.path = '{path}' is not a folder; give one that holds a folder per class")
    if val_path is None and (root / "train").is_dir():
        sides = [root / name for name in ("val", "validation", "test", "valid") if (root / name).is_dir()]
        if sides:
            root, val_path = root / "train", str(sides[0])
    train = read_classes(root, broken)
    if val_path is None:
        first, second = stratified_split(train.labels, val_fraction, seed)
        return train.subset(first), train.subset(second)
    if not Path(val_path).expanduser().is_dir():
        raise ValueError(f"data.val_path = '{val_path}' is not a folder")
    return train, read_classes(Path(val_path).expanduser(), broken, train.classes)


def read_classes(root: Path, broken: str, classes: list[str] | None = None) -> Images:
    """Every picture below the folders of `root`, one folder per class; `broken` says what happens to other files."""
    found = sorted(d.name for d in root.iterdir() if d.is_dir() and not d.name.startswith("."))
    if not found:
        raise ValueError(f"{root} holds no folders; an image folder has one folder per class with its pictures inside")
    unknown = sorted(set(found) - set(classes or found))
    if unknown:
        raise ValueError(
            f"{root} has classes that the training folder does not know: {', '.join(unknown[:10])}; its "
            f"own are {', '.join(classes[:5])}{' ...' if len(classes) > 5 else ''}"
        )
    classes = classes or found
    files, labels, bad = [], [], []
    for label, name in enumerate(classes):
        members = [f for f in sorted((root / name).rglob("*")) if f.is_file() and not f.name.startswith(".")]
        good = [f for f in members if readable(f)]
        bad += sorted(set(members) - set(good))
        if not good:
            raise ValueError(f"class '{name}' has no readable images in {root / name}; remove the folder or fill it")
        files += good
        labels += [label] * len(good)
    if bad:
        message = (
            f"{len(bad)} of {len(bad) + len(files)} files in {root} are no readable images: "
            f"{', '.join(str(f.relative_to(root)) for f in bad[:5])}{' ...' if len(bad) > 5 else ''}"
        )
        if broken == "refuse":
            raise ValueError(f"{message}; remove them, or set data.broken=skip")
        print(f"warning: skipped: {message}", flush=True)
    names = [f.relative_to(root).as_posix() for f in files]
    sizes = "\n".join(f"{name} {f.stat().st_size}" for name, f in zip(names, files))
    return Images(
        str(root),
        functools.partial(_read_file, files),
        np.array(labels),
        classes,
        hashlib.sha256(sizes.encode()).hexdigest(),
        names,
    )


def readable(file: Path) -> bool:
    """A file that PIL recognises and whose structure is whole (pixels are not decoded)."""
    from PIL import Image

    if file.suffix.lower() not in SUFFIXES:
        return False
    try:
        with Image.open(file) as image:
            image.verify()
        return True
    except (OSError, SyntaxError, ValueError):
        return False


def open_image(file: Path):
    """The decoded image; a file that broke since it was checked is named."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            image.load()
            return image.copy()
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{file} cannot be decoded ({error}); remove it, or write it anew") from None


def torchvision_images(name: str, root: Path) -> tuple[Images, Images]:
    """A data set of torchvision by name in any case (cifar10, mnist, FashionMNIST, SVHN, ...), downloaded to root."""
    from ssmzoo._torchvision import make_importable

    try:
        make_importable()
        from torchvision import datasets
    except ImportError:
        raise ValueError(f"data.dataset = 'torchvision/{name}' needs torchvision: pip install torchvision") from None
    known = {d.lower(): d for d in datasets.__all__}
    wanted = known.get(name.lower().replace("_", "").replace("-", ""))
    if wanted is None:
        import difflib

        close = difflib.get_close_matches(name.lower(), known, n=3)
        raise ValueError(f"torchvision has no data set '{name}'" + (f"; nearest: {', '.join(close)}" if close else ""))
    cls, sides = getattr(datasets, wanted), []
    try:
        for train in (True, False):
            try:
                sides.append(cls(root, train=train, download=True))
            except TypeError:
                sides.append(cls(root, split="train" if train else "test", download=True))
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"torchvision's {wanted} could not be downloaded to {root} ({str(error).splitlines()[0]}); "
            f"put its files there, or use data.path=<folder with one folder per class>"
        ) from None
    return tuple(_from_torchvision(side, f"torchvision {wanted}") for side in sides)


def _from_torchvision(data, name: str) -> Images:
    labels = next((getattr(data, key) for key in ("targets", "labels", "_labels") if hasattr(data, key)), None)
    labels = np.asarray([data[i][1] for i in range(len(data))] if labels is None else labels).astype(np.int64)
    classes = [str(c) for c in getattr(data, "classes", range(int(labels.max()) + 1))]
    fingerprint = hashlib.sha256(name.encode() + labels.tobytes()).hexdigest()
    return Images(name, functools.partial(_read_column, data, 0), labels, classes, fingerprint)


def hub_images(name: str, cache: Path, val_fraction: float, seed: int) -> tuple[Images, Images]:
    """A data set of the Hugging Face hub with an image and a label column; `name:config` picks a configuration."""
    try:
        from datasets import ClassLabel, Image, load_dataset
    except ImportError:
        raise ValueError(f"data.dataset = 'hf/{name}' needs the datasets package: pip install 'ssmzoo[hf]'") from None
    repository, _, configuration = name.partition(":")
    try:
        found = load_dataset(repository, configuration or None, cache_dir=str(cache))
    except Exception as error:  # the hub client raises many kinds of errors for an unreachable or unknown data set
        raise ValueError(
            f"'{name}' cannot be loaded from the hub ({str(error).splitlines()[0]}); check "
            f"the name and the network, or use data.path=<folder with one folder per class>"
        ) from None
    if "train" not in found:
        raise ValueError(f"'{name}' has the splits {', '.join(found)}, but no 'train'")
    features = found["train"].features
    image = next((key for key, feature in features.items() if isinstance(feature, Image)), None)
    label = next((key for key, feature in features.items() if isinstance(feature, ClassLabel)), None)
    if image is None or label is None:
        raise ValueError(f"'{name}' has the columns {', '.join(features)}; it needs an image and a class label column")

    def images(side) -> Images:
        labels = np.array(side[label], dtype=np.int64)
        return Images(
            f"{name}",
            functools.partial(_read_column, side, image),
            labels,
            features[label].names,
            hashlib.sha256(side._fingerprint.encode()).hexdigest(),
        )

    train = images(found["train"])
    held_out = next((key for key in ("validation", "valid", "val", "test") if key in found), None)
    if held_out is not None:
        return train, images(found[held_out])
    first, second = stratified_split(train.labels, val_fraction, seed)
    return train.subset(first), train.subset(second)
