"""Where labelled images come from: the digits of scikit-learn, folders with a class each, torchvision, Hugging Face.

Every source is a pair (train, validation) of `Images`; which image belongs to which side follows from a seed alone.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ssmzoo.data.image_file import (
    SUFFIXES,
    ImageError,
    check_size,
    is_grey,
    picture_of,
    read_image8,
    read_picture,
    walk_files,
)
from ssmzoo.data.text_store import cache_folder
from ssmzoo.terminal import printable

LOOKED_AT = 64  # images of a source that says nothing of their colours


@dataclass
class Images:
    """Labelled images. `read(i)` is a PIL image of mode L or RGB, `labels` (n) integers, `classes` and `files` their
    names; `grey` says whether none has colour (None: not known without decoding)."""

    name: str
    read: Callable[[int], Any]
    labels: np.ndarray
    classes: list[str]
    fingerprint: str
    files: list[str] | None = None
    grey: bool | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Sequence[int]) -> Images:
        indices = np.asarray(indices)
        files = None if self.files is None else [self.files[i] for i in indices]
        read = functools.partial(_read_chosen, self.read, indices)
        return Images(self.name, read, self.labels[indices], self.classes, self.fingerprint, files, self.grey)

    @property
    def channels(self) -> int:
        """1 where no image has colour, otherwise 3; by a spread of images where the source does not know."""
        if self.grey is None:
            spread = np.unique(np.linspace(0, len(self) - 1, LOOKED_AT).astype(int))
            self.grey = all(is_grey(self.read(int(i))) for i in spread)
        return 1 if self.grey else 3


# Readers are functions of modules with bound arguments, for where data workers are sent their data set by pickle.
def _read_chosen(read: Callable[[int], Any], indices: np.ndarray, i: int):
    return read(int(indices[i]))


def _read_array(levels: np.ndarray, i: int):
    from PIL import Image

    return Image.fromarray(levels[i])


def _read_file(files: list[Path], i: int):
    try:
        return read_image8(files[i])
    except ImageError as error:  # it broke since it was looked at, or only decoding shows it
        raise ValueError(f"{error}; remove it, write it anew, or set data.broken=skip") from None


def _read_column(data, column: int | str, i: int):
    image = data[i][column]
    return image if image.mode in ("L", "RGB") else picture_of(image).image8()


def stratified_split(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(train, validation) indices: of every class, a random share of `fraction` is held out, at least one image and at
    most all but one; the only image of a class is trained on."""
    if not 0 < fraction < 1:
        raise ValueError(f"data.val_fraction = {fraction}; give a share between 0 and 1, such as 0.2")
    generator, held_out = np.random.default_rng(seed), []
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        held_out.extend(members[: min(max(1, round(fraction * len(members))), len(members) - 1)])
    held_out = np.sort(np.array(held_out, dtype=np.int64))
    return np.setdiff1d(np.arange(len(labels)), held_out), held_out


def split(whole: Images, fraction: float, seed: int) -> tuple[Images, Images]:
    """`stratified_split` of images; says which classes validation cannot have."""
    first, second = stratified_split(whole.labels, fraction, seed)
    single = [whole.classes[label] for label in np.flatnonzero(np.bincount(whole.labels) == 1)]
    if single:
        names = f"{', '.join(map(printable, single[:5]))}{' ...' if len(single) > 5 else ''}"
        print(f"warning: classes with a single image, trained on and never validated: {names}", flush=True)
    return whole.subset(first), whole.subset(second)


def digits(val_fraction: float, seed: int) -> tuple[Images, Images]:
    """1,797 real handwritten digits of 8x8 pixels, 17 grey levels, which ship with scikit-learn."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ValueError(
            "the embedded digits need scikit-learn: pip install scikit-learn, or give "
            "data.path=<folder with one folder per class>"
        ) from None
    found = load_digits()
    levels = np.rint(found.images * (255 / 16)).astype(np.uint8)  # (1797 8 8)
    whole = from_arrays("scikit-learn digits", levels, found.target, [str(c) for c in found.target_names])
    return split(whole, val_fraction, seed)


def from_arrays(name: str, levels: np.ndarray, labels: np.ndarray, classes: list[str]) -> Images:
    """levels (n y x) or (n y x 3) uint8, labels (n)"""
    fingerprint = hashlib.sha256(np.ascontiguousarray(levels).tobytes() + labels.astype(np.int64).tobytes()).hexdigest()
    read = functools.partial(_read_array, levels)
    return Images(name, read, labels.astype(np.int64), classes, fingerprint, grey=levels.ndim == 3)


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
        return split(train, val_fraction, seed)
    if not Path(val_path).expanduser().is_dir():
        raise ValueError(f"data.val_path = '{val_path}' is not a folder")
    return train, read_classes(Path(val_path).expanduser(), broken, train.classes)


def read_classes(root: Path, broken: str, classes: list[str] | None = None) -> Images:
    """Every picture below the folders of `root`, one folder per class; `broken` says what happens to other files:
    "refuse" looks at headers and structure, "skip" decodes every picture once and remembers what it found."""
    found = sorted(d.name for d in root.iterdir() if d.is_dir() and not d.name.startswith("."))
    if not found:
        raise ValueError(f"{root} holds no folders; an image folder has one folder per class with its pictures inside")
    unknown = sorted(set(found) - set(classes or found))
    if unknown:
        raise ValueError(
            f"{root} has classes that the training folder does not know: {', '.join(map(printable, unknown[:10]))}; "
            f"its own are {', '.join(map(printable, classes[:5]))}{' ...' if len(classes) > 5 else ''}"
        )
    classes = classes or found
    members = [walk_files(root / name) if (root / name).is_dir() else [] for name in classes]
    grey = _kinds([f for files in members for f in files], decode=broken == "skip")
    for name, inside in zip(classes, members):
        if not any(grey[f] is not None for f in inside):
            raise ValueError(
                f"class '{printable(name)}' has no readable images in {printable(str(root / name))}; "
                f"remove the folder or fill it"
            )
    bad = [f for inside in members for f in inside if grey[f] is None]
    if bad:
        message = (
            f"{len(bad)} of {len(grey)} files in {root} are no readable images: "
            f"{', '.join(printable(str(f.relative_to(root))) for f in bad[:5])}{' ...' if len(bad) > 5 else ''}"
        )
        if broken == "refuse":
            raise ValueError(f"{message}; remove them, or set data.broken=skip")
        print(f"warning: skipped: {message}", flush=True)
    files = [f for inside in members for f in inside if grey[f] is not None]
    labels = [label for label, inside in enumerate(members) for f in inside if grey[f] is not None]
    names = [f.relative_to(root).as_posix() for f in files]
    sizes = "\n".join(f"{name} {f.stat().st_size}" for name, f in zip(names, files))
    fingerprint = hashlib.sha256(sizes.encode("utf-8", "surrogateescape")).hexdigest()
    read = functools.partial(_read_file, files)
    return Images(str(root), read, np.array(labels), classes, fingerprint, names, all(grey[f] for f in files))


def _kinds(files: list[Path], decode: bool) -> dict[Path, bool | None]:
    """Of every file whether it is grey, or None where it is no readable image. What decoding found is kept in the
    cache folder, by path, size and time of change."""
    if not decode:
        return {f: header_grey(f) for f in files}
    stats = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    key = hashlib.sha256(json.dumps(stats).encode()).hexdigest()[:32]
    memory = cache_folder(None) / "images" / f"{key}.json"
    if memory.is_file():
        return dict(zip(files, json.loads(memory.read_text())))
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoders release the interpreter's lock
        found = list(pool.map(decoded_grey, files))
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        temporary = memory.with_suffix(f".tmp{os.getpid()}")
        temporary.write_text(json.dumps(found))
        os.replace(temporary, memory)
    except OSError:
        pass  # found again next time
    return dict(zip(files, found))


def header_grey(file: Path) -> bool | None:
    """Whether a file that PIL recognises, and whose structure is whole, is grey; None for others. No pixel is read."""
    from PIL import Image

    if file.suffix.lower() not in SUFFIXES:
        return None
    try:
        with Image.open(file) as image:
            check_size(*image.size)
            grey = is_grey(image)
            image.verify()
        return grey
    except Exception:  # decoders raise many kinds over hostile bytes
        return None


def decoded_grey(file: Path) -> bool | None:
    """The same after decoding every pixel."""
    try:
        return read_picture(file).levels.shape[-1] == 1 if file.suffix.lower() in SUFFIXES else None
    except ImageError:
        return None


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
        raise ValueError(f"data.dataset = 'hf/{name}' needs the datasets package: pip install datasets") from None
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
    return split(train, val_fraction, seed)
