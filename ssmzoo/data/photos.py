"""Photographs for restoration: degraded and clean pairs, made on the fly or read from paired folders."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

import numpy as np
from lightning.pytorch import LightningDataModule

from ssmzoo.data.image_file import find_pictures, read_picture
from ssmzoo.data.loader import ResumableLoader
from ssmzoo.data.photo_patches import Degradation, Patches, Photo, WholePictures
from ssmzoo.data.staged_loader import StagedLoader

DEGRADATIONS = ("bicubic", "noise", "jpeg", "paired")
PARTNERS = ("{name}", "{name}x{scale}")  # what a degraded picture is called; the second as in DIV2K and Flickr2K
EMBEDDED_TRAIN = ("astronaut", "rocket", "motorcycle_left", "motorcycle_right", "hubble", "retina", "ihc", "china")
EMBEDDED_VAL = ("chelsea", "coffee", "flower")


def embedded_photo(name: str) -> np.ndarray:
    """(y x 3) uint8: a colour photograph that ships with scikit-image or scikit-learn."""
    try:
        from skimage import data as skimage_data
        from sklearn.datasets import load_sample_image
    except ImportError as error:
        raise ValueError(
            f"the embedded photographs need scikit-image and scikit-learn ({error.name} is missing): "
            f"pip install scikit-image scikit-learn, or give data.path=<folder of pictures>"
        ) from None
    if name in ("china", "flower"):
        return load_sample_image(f"{name}.jpg")
    if name.startswith("motorcycle"):
        return skimage_data.stereo_motorcycle()[name.endswith("right")]
    names = {"hubble": "hubble_deep_field", "ihc": "immunohistochemistry"}
    return getattr(skimage_data, names.get(name, name))()


def embedded(names: tuple[str, ...]) -> list[Photo]:
    return [Photo(name, functools.partial(embedded_photo, name)) for name in names]


def read_levels(path: Path) -> np.ndarray:
    """(y x c) uint8 of a file; 16-bit pictures are rounded, transparency is left out."""
    return read_picture(path).levels8()


def folder_photos(folder: str, degraded: str | None = None, template: str | None = None, scale: int = 1) -> list[Photo]:
    """The pictures of a folder, each with its partner under `degraded` if that is given, by name (any suffix).

    template  the partner's name, of {name} and {scale}, such as DIV2K's "{name}x{scale}"; None: whichever of
              PARTNERS fits all pictures
    """
    clean = _by_name(folder)
    if degraded is None:
        return [Photo(name, functools.partial(read_levels, f)) for name, f in clean.items()]
    partners = _by_name(degraded)
    tried = [template] if template else PARTNERS
    named = [{name: p.replace("{name}", name).replace("{scale}", str(scale)) for name in clean} for p in tried]
    whole = next((names for names in named if set(names.values()) <= set(partners)), None)
    if whole is None:
        missing = [name for name in clean if not any(names[name] in partners for names in named)] or list(clean)
        raise ValueError(
            f"{len(missing)} of {len(clean)} pictures in {folder} have no partner of the name {' or '.join(tried)} in "
            f"{degraded}: {', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}; data.degraded_name says how "
            f"partners are called"
        )
    return [
        Photo(name, functools.partial(read_levels, f), functools.partial(read_levels, partners[whole[name]]))
        for name, f in clean.items()
    ]


def _by_name(folder: str) -> dict[str, Path]:
    """{path below the folder without suffix: file}; ValueError for two files that differ in nothing else."""
    found: dict[str, Path] = {}
    for f in find_pictures(folder):
        name = f.relative_to(Path(folder).expanduser()).with_suffix("").as_posix()
        if name in found:
            raise ValueError(f"{found[name]} and {f} differ in their suffix only; remove one of them")
        found[name] = f
    return found


def hold_out(photos: list[Photo], count: int) -> tuple[list[Photo], list[Photo]]:
    """(training, held out): the `count` photos whose names hash lowest stay out, whatever else is in the folder."""
    if count >= len(photos):
        raise ValueError(
            f"{len(photos)} pictures leave none to train on when data.holdout = {count} are held out; "
            f"give more pictures, or data.val_path=<another folder>"
        )
    order = sorted(photos, key=lambda p: hashlib.sha256(p.name.encode()).hexdigest())
    out = {p.name for p in order[:count]}
    return [p for p in photos if p.name not in out], [p for p in photos if p.name in out]


def _range(name: str, value, low: float, high: float) -> tuple:
    """A number or [from, to] as a pair."""
    pair = tuple(value) if isinstance(value, (list, tuple)) else (value, value)
    if len(pair) != 2 or not low <= pair[0] <= pair[1] <= high:
        raise ValueError(f"data.{name} = {value}; give a number or [from, to] between {low} and {high}")
    return pair


def _check_folders(paired: bool, path, degraded_path, val_path, val_degraded_path) -> None:
    if not paired and (degraded_path or val_degraded_path):
        raise ValueError("data.degraded_path needs data.degradation=paired")
    if paired and not (path and degraded_path) and not (val_path and val_degraded_path):
        raise ValueError("data.degradation=paired needs data.path=<clean folder> and data.degraded_path=<the other>")
    if paired and (val_path is None) != (val_degraded_path is None):
        raise ValueError("give both data.val_path and data.val_degraded_path, or neither")


class PhotoData(LightningDataModule):
    """Pairs of degraded and clean pictures in [0, 1]; by default the photographs of scikit-image and scikit-learn.

    path            folder of clean pictures to train on, any depth (DIV2K layout); None: the embedded photographs
    val_path        folder to validate on; None: `holdout` pictures of `path`, chosen by the hash of their names
    degraded_path, val_degraded_path   for degradation=paired: the partners
    degraded_name   a partner's name, of {name} and {scale}; None: "{name}" or "{name}x{scale}" (DIV2K)
    degradation     bicubic (MATLAB's, by `scale`), noise (Gaussian), jpeg, paired
    scale           clean side over degraded side; None: 2 for bicubic, otherwise 1
    sigma           noise in 8-bit levels, or [from, to] for blind training (evaluated at `from`)
    quality         JPEG quality, or [from, to]
    grey            one channel
    patch_size      side of a training crop of the clean picture;  batch_size  crops per step and process
    patch_schedule  progressive training: [[patch_size, batch_size, steps], ...] in place of the two above
    repeats         passes over all pictures per epoch
    val_crop        validate on the central so many pixels; None: on whole pictures
    augment         flips and transposes

    A batch is {"lq" (b c y/s x/s), "gt" (b c y x)}; validation gives one picture at a time, with its "name".

    Raises ValueError for arguments out of range, folders that are missing or empty, pairs that do not fit, and pictures
    smaller than a crop.
    """

    def __init__(
        self,
        path: str | None = None,
        val_path: str | None = None,
        degraded_path: str | None = None,
        val_degraded_path: str | None = None,
        degradation: str = "bicubic",
        scale: int | None = None,
        sigma: float | list[float] = 25.0,
        quality: int | list[int] = 40,
        grey: bool = False,
        patch_size: int = 64,
        batch_size: int = 8,
        patch_schedule: list[list[int]] | None = None,
        repeats: int = 100,
        val_crop: int | None = 256,
        holdout: int = 3,
        augment: bool = True,
        seed: int = 0,
        num_workers: int = 0,
        degraded_name: str | None = None,
    ):
        super().__init__()
        if degraded_name is not None and ("{name}" not in degraded_name or degradation != "paired"):
            raise ValueError(
                f"data.degraded_name = '{degraded_name}' goes with data.degradation=paired and holds {{name}}, and "
                f"{{scale}} if need be, such as '{{name}}x{{scale}}'"
            )
        if degradation not in DEGRADATIONS:
            raise ValueError(f"data.degradation = '{degradation}'; choose one of {', '.join(DEGRADATIONS)}")
        scale = (2 if degradation == "bicubic" else 1) if scale is None else scale
        if scale < (2 if degradation == "bicubic" else 1) or (scale > 1 and degradation in ("noise", "jpeg")):
            raise ValueError(
                f"data.scale = {scale} does not go with data.degradation = {degradation}; noise and JPEG "
                f"keep the size (1), bicubic takes 2 or more"
            )
        self.schedule = [tuple(stage) for stage in patch_schedule or []]
        if any(len(stage) != 3 or min(stage) < 1 for stage in self.schedule):
            raise ValueError(f"data.patch_schedule = {patch_schedule}; give [[patch_size, batch_size, steps], ...]")
        for patch in [stage[0] for stage in self.schedule] or [patch_size]:
            if patch < scale or patch % scale:
                raise ValueError(f"data.patch_size = {patch} is not a multiple of data.scale = {scale}")
        _check_folders(degradation == "paired", path, degraded_path, val_path, val_degraded_path)
        for name, value in (("holdout", holdout), ("repeats", repeats), ("val_crop", val_crop)):
            if value is not None and value < 1:
                raise ValueError(f"data.{name} = {value}; it must be at least 1")
        self.degradation = Degradation(
            degradation, scale, _range("sigma", sigma, 0, 255), _range("quality", quality, 1, 100)
        )
        self.path, self.val_path, self.grey, self.holdout = path, val_path, grey, holdout
        self.degraded_path, self.val_degraded_path = degraded_path, val_degraded_path
        self.degraded_name = degraded_name
        self.patch_size, self.batch_size, self.repeats, self.val_crop = patch_size, batch_size, repeats, val_crop
        self.augment, self.seed, self.num_workers = augment, seed, num_workers
        self._training: list[Photo] | None = None
        self._held_out: list[Photo] | None = None

    @classmethod
    def for_evaluation(cls, saved: dict, typed: dict) -> dict:
        """Arguments of an evaluation: a folder typed as `path` is evaluated whole, nothing of it is held out."""
        if "path" in typed and "val_path" not in typed:
            renamed = {"path": "val_path", "degraded_path": "val_degraded_path"}
            typed = {renamed.get(k, k): v for k, v in typed.items()}
        return saved | typed

    @property
    def sizes(self) -> dict[str, int]:
        return {"upscale": self.degradation.scale, "in_chans": 1 if self.grey else 3}

    def setup(self, stage: str | None = None) -> None:
        self.held_out()
        if stage in (None, "fit"):
            self.training()

    def splits(self) -> tuple[list[Photo], list[Photo]]:
        """(training, held-out) photos."""
        return self.training(), self.held_out()

    def training(self) -> list[Photo]:
        if self._training is None:
            self._training = self._own()[0] if self.val_path is None else self._folder_or_embedded()
        return self._training

    def held_out(self) -> list[Photo]:
        """With val_path the training folder need not exist."""
        if self._held_out is None:
            self._held_out = (
                self._own()[1] if self.val_path is None else self._pictures(self.val_path, self.val_degraded_path)
            )
        return self._held_out

    def _pictures(self, folder: str, degraded: str | None) -> list[Photo]:
        return folder_photos(folder, degraded, self.degraded_name, self.degradation.scale)

    def _folder_or_embedded(self) -> list[Photo]:
        return embedded(EMBEDDED_TRAIN) if self.path is None else self._pictures(self.path, self.degraded_path)

    def _own(self) -> tuple[list[Photo], list[Photo]]:
        """Without val_path: the embedded split, or the folder less its held-out pictures."""
        if self.path is None:
            return embedded(EMBEDDED_TRAIN), embedded(EMBEDDED_VAL)
        return hold_out(self._folder_or_embedded(), self.holdout)

    def train_dataloader(self) -> ResumableLoader | StagedLoader:
        def crops(patch_size: int, batch_size: int) -> ResumableLoader:
            patches = Patches(self.training(), self.degradation, self.grey, patch_size, self.repeats, self.augment)
            return self._loader(patches, batch_size, train=True)

        if self.schedule:
            return StagedLoader([(crops(patch, batch), steps) for patch, batch, steps in self.schedule])
        return crops(self.patch_size, self.batch_size)

    def val_dataloader(self) -> ResumableLoader:
        return self._loader(WholePictures(self.held_out(), self.degradation, self.grey, self.val_crop), 1, train=False)

    def _loader(self, dataset, batch_size: int, train: bool) -> ResumableLoader:
        trainer = self.trainer
        rank, world = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        return ResumableLoader(
            dataset,
            batch_size,
            shuffle=train,
            drop_last=train,
            seed=self.seed,
            num_workers=self.num_workers if train else 0,
            rank=rank,
            world_size=world,
        )

    def describe(self) -> dict:
        """What the run was trained and validated on, for manifests."""
        train, val = self.splits()
        names = hashlib.sha256("\n".join(p.name for p in train + val).encode()).hexdigest()
        d = self.degradation
        return {
            "train_pictures": len(train),
            "val_pictures": [p.name for p in val][:20],
            "names_sha256": names,
            "degradation": d.kind,
            "scale": d.scale,
            "sigma": list(d.sigma),
            "quality": list(d.quality),
        }
