"""Labelled images for classifiers: any source, augmented by timm's transforms, reproducible sample by sample."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import Dataset

from ssmzoo.data import image_sources as sources
from ssmzoo.data.loader import Draw, ResumableLoader, refuse_other_data
from ssmzoo.data.text_store import cache_folder
from ssmzoo.suggest import check_slot

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
GREY = ((0.5,), (0.5,))
AUGMENT = {"scale", "ratio", "hflip", "vflip", "color_jitter", "auto_augment", "re_prob", "re_mode", "re_count"}


def reseed(seed: int) -> None:
    """Python's, NumPy's and torch's generators start from `seed`."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed % 2**63)  # torch.manual_seed also queues calls for every accelerator


@contextlib.contextmanager
def generators_kept() -> Iterator[None]:
    """Python's, NumPy's and torch's generators are afterwards as before."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


class ImageSamples(Dataset):
    """`[Draw(index, seed)]` -> {"image" (c y x) float, "label"}; random choices follow from the seed.

    transform   of torchvision's kind; where it ends by making a tensor and normalising it, that is done for a whole
                batch at once: image by image it takes longer than cropping and scaling
    """

    def __init__(self, images: sources.Images, transform, mode: str):
        self.images, self.transform, self.normalise, self.mode = images, transform, None, mode
        if type(transform.transforms[-1]).__name__ == "Normalize":
            self.transform = type(transform)(transform.transforms[:-2])
            self.normalise = transform.transforms[-1]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, draw: Draw) -> dict:
        return self.__getitems__([draw])[0]

    def __getitems__(self, draws: list[Draw]) -> list[dict]:
        """torch's loader asks for a batch by this name."""
        found = []
        with generators_kept():
            for draw in draws:
                image = self.images.read(draw.index).convert(self.mode)
                reseed(draw.seed)
                found.append(self.transform(image))
        if self.normalise is not None:
            found = self.normalise(_to_tensors(found))
        return [{"image": image, "label": int(self.images.labels[draw.index])} for image, draw in zip(found, draws)]


def _to_tensors(pictures: list) -> Tensor:
    """PIL images of one size, 8 bits per channel -> (b c y x) in [0, 1]"""
    levels = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))  # (b y x) or (b y x c)
    levels = levels.unsqueeze(1) if levels.ndim == 3 else levels.permute(0, 3, 1, 2)
    return levels.to(torch.float32, memory_format=torch.contiguous_format).div(255)


class ImageData(LightningDataModule):
    """Images with labels, split into training and validation.

    dataset       "digits" (ships with scikit-learn), "torchvision/<name>", "hf/<name>[:config]"; ignored with a path
    path          folder with one folder per class, or with train/ and val/ above those; where torchvision downloads
    val_path      folder to validate on; None: train/val, the data set's own split, or a share of every class
    val_fraction  that share;  split_seed  decides who is held out
    broken        "refuse" or "skip" files that are no readable images; skip decodes every picture once at the start
    image_size    side in pixels that everything is scaled and cropped to
    in_chans      1 or 3; None: 3 if any image has colour
    augment       arguments of timm's create_transform: scale, ratio, hflip, vflip, color_jitter, auto_augment, re_prob,
                  re_mode, re_count; and three_augment=true (grey, solarise or blur, DeiT III)
    crop_pct      share of the shorter side kept by the centre crop of validation
    batch_size    images per step and process (an even number for mixup)
    repeats       how often an image is drawn in an epoch, each time augmented anew (the epoch stays as long)

    A batch is {"image" (b c y x), "label" (b)}. Raises ValueError for whatever cannot be read or does not fit.
    """

    def __init__(
        self,
        dataset: str = "digits",
        path: str | None = None,
        val_path: str | None = None,
        val_fraction: float = 0.2,
        split_seed: int = 0,
        broken: str = "refuse",
        image_size: int = 32,
        in_chans: int | None = None,
        augment: dict | None = None,
        crop_pct: float = 1.0,
        batch_size: int = 64,
        seed: int = 0,
        num_workers: int = 0,
        repeats: int = 1,
    ):
        super().__init__()
        if broken not in ("refuse", "skip"):
            raise ValueError(f"data.broken = '{broken}'; choose refuse or skip")
        if in_chans not in (None, 1, 3):
            raise ValueError(f"data.in_chans = {in_chans}; images have 1 (grey) or 3 (colour) channels")
        if min(image_size, batch_size) < 1 or not 0 < crop_pct <= 1:
            raise ValueError(
                f"data.image_size = {image_size} and data.batch_size = {batch_size} must be positive, "
                f"data.crop_pct = {crop_pct} in (0, 1]"
            )
        check_slot("data.augment", augment, [*sorted(AUGMENT), "three_augment"], "data.augment")
        self.dataset, self.path, self.val_path = dataset, path, val_path
        self.val_fraction, self.split_seed, self.broken = val_fraction, split_seed, broken
        self.image_size, self.in_chans, self.crop_pct = image_size, in_chans, crop_pct
        self.augment = dict(augment or {})
        self.batch_size, self.seed, self.num_workers, self.repeats = batch_size, seed, num_workers, repeats
        self._sides: tuple[sources.Images, sources.Images] | None = None

    # Lightning's hooks

    def prepare_data(self) -> None:
        self._open()

    def setup(self, stage: str | None = None) -> None:
        self._open()

    def train_dataloader(self) -> ResumableLoader:
        return self._loader(0, shuffle=True)

    def val_dataloader(self) -> ResumableLoader:
        return self._loader(1, shuffle=False)

    def state_dict(self) -> dict:
        return {"images": self._open()[0].fingerprint, "seed": self.seed, "image_size": self.image_size}

    def load_state_dict(self, state: dict) -> None:
        refuse_other_data(self, state)

    # What others may ask

    @property
    def sizes(self) -> dict[str, int]:
        return {"in_chans": self.channels, "num_classes": len(self.classes), "img_size": self.image_size}

    @property
    def classes(self) -> list[str]:
        return self._open()[0].classes

    @property
    def channels(self) -> int:
        if self.in_chans is None:
            self.in_chans = self._open()[0].channels
        return self.in_chans

    def describe(self) -> dict:
        train, val = self._open()
        return {
            "dataset": train.name,
            "fingerprint": train.fingerprint,
            "classes": len(train.classes),
            "train_images": len(train),
            "val_images": len(val),
            "image_size": self.image_size,
        }

    def normalisation(self) -> tuple[Sequence[float], Sequence[float]]:
        """Mean and deviation that images are normalised with: ImageNet's for colour, 0.5 for grey."""
        return IMAGENET if self.channels == 3 else GREY

    def levels(self, image: Tensor) -> Tensor:
        """Undo the normalisation: (... c y x) -> values in [0, 1], for pictures."""
        mean, std = (image.new_tensor(v).view(-1, 1, 1) for v in self.normalisation())
        return (image * std + mean).clamp(0, 1)

    def linear_baseline(self, limit: int = 3000, side: int = 32) -> float | None:
        """Validation accuracy of scikit-learn's logistic regression on pixels (None without it): at most `limit` images
        a split, at most side x side pixels."""
        try:
            from sklearn.linear_model import LogisticRegression
        except ImportError:
            return None
        (x, y), (x_val, y_val) = (self.pixels(i, limit, side) for i in (0, 1))
        return float(LogisticRegression(max_iter=300).fit(x, y).score(x_val, y_val))

    def pixels(self, which: int, limit: int, side: int) -> tuple[np.ndarray, np.ndarray]:
        """(n pixels) in [-0.5, 0.5] and (n) labels of an even spread of images."""
        images, mode = self._open()[which], "L" if self.channels == 1 else "RGB"
        chosen = np.unique(np.linspace(0, len(images) - 1, min(limit, len(images))).astype(int))
        if len(chosen) < len(images):
            chosen = np.random.default_rng(0).permutation(len(images))[:limit]
        side = min(side, *images.read(0).size)
        rows = [np.asarray(images.read(int(i)).convert(mode).resize((side, side)), dtype=np.float32) for i in chosen]
        return np.stack(rows).reshape(len(chosen), -1) / 255 - 0.5, images.labels[chosen]

    # How it is done

    def _open(self) -> tuple[sources.Images, sources.Images]:
        if self._sides is None:
            self._sides = self._find()
            train, val = self._sides
            if len(train) < 1 or len(val) < 1:
                raise ValueError(f"{train.name} has {len(train)} training and {len(val)} validation images")
        return self._sides

    def _find(self) -> tuple[sources.Images, sources.Images]:
        kind, _, name = self.dataset.partition("/")
        if kind == "torchvision" and name:
            root = Path(self.path).expanduser() if self.path else cache_folder(None) / "torchvision"
            return sources.torchvision_images(name, root)
        if self.path is not None:
            return sources.folders(self.path, self.val_path, self.val_fraction, self.split_seed, self.broken)
        if kind == "hf" and name:
            return sources.hub_images(name, cache_folder(None) / "hf", self.val_fraction, self.split_seed)
        if self.dataset == "digits":
            return sources.digits(self.val_fraction, self.split_seed)
        raise ValueError(
            f"data.dataset = '{self.dataset}'; choose digits, torchvision/<name> or hf/<name>, or give "
            f"data.path=<folder with one folder per class>"
        )

    def _loader(self, which: int, shuffle: bool) -> ResumableLoader:
        trainer = self.trainer
        rank, world = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        mode = "L" if self.channels == 1 else "RGB"
        samples = ImageSamples(self._open()[which], self._transform(training=shuffle), mode)
        batch_size = self._filled(len(samples) // world) if shuffle else self.batch_size
        return ResumableLoader(
            samples,
            batch_size,
            shuffle=shuffle,
            drop_last=shuffle,
            seed=self.seed,
            num_workers=self.num_workers,
            rank=rank,
            world_size=world,
            repeats=self.repeats,
        )

    def _filled(self, images: int) -> int:
        """The batch size, or with fewer training images per process, as many as there are (an even number)."""
        if not 1 < images < self.batch_size:
            return self.batch_size
        print(
            f"warning: {images} training images per process, below data.batch_size={self.batch_size}: batches of "
            f"{images - images % 2}",
            flush=True,
        )
        return images - images % 2

    def _transform(self, training: bool):
        from ssmzoo._torchvision import make_importable

        try:
            make_importable()
            from timm.data import create_transform
        except ImportError:
            raise ValueError("image transforms need timm: pip install timm") from None
        mean, std = self.normalisation()
        shape = (self.channels, self.image_size, self.image_size)
        if not training:
            return create_transform(shape, interpolation="bicubic", mean=mean, std=std, crop_pct=self.crop_pct)
        chosen = dict(self.augment)
        three = chosen.pop("three_augment", False)
        chosen = {"color_jitter": 0.0, "hflip": 0.0, "scale": (1.0, 1.0), "ratio": (1.0, 1.0)} | chosen
        chosen["color_jitter"] = chosen["color_jitter"] or None  # a jitter by 0 takes a third of the time
        return (
            create_transform(
                shape, is_training=True, interpolation="bicubic", mean=mean, std=std, separate=False, **chosen
            )
            if not three
            else three_augment(shape, mean, std, chosen)
        )


def three_augment(shape: tuple[int, int, int], mean: Sequence[float], std: Sequence[float], chosen: dict):
    """3-Augment of DeiT III: random resized crop, flip, exactly one of grey, solarise and blur, colour jitter."""
    from torchvision import transforms as T

    one_of = [T.Grayscale(shape[0]), T.RandomSolarize(128, p=1.0), T.GaussianBlur(5, (0.1, 2.0))]
    jitter = chosen["color_jitter"]
    return T.Compose(
        [
            T.RandomResizedCrop(shape[1:], tuple(chosen["scale"]), tuple(chosen["ratio"]), T.InterpolationMode.BICUBIC),
            T.RandomHorizontalFlip(chosen["hflip"]),
            T.RandomChoice(one_of),
            *([T.ColorJitter(jitter, jitter, jitter)] if jitter else []),
            T.ToTensor(),
            T.Normalize(mean, std),
        ]
    )
