"""Labelled images in sessions: many of the base classes, then a few of some new classes at a time.

The list of CIFAR-100 is the split used by the field (CEC, Zhang et al. 2021, arXiv 2104.03047): indices in the standard
training file of the five images of every class from 60 on.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ssmzoo.data.image_sources import Images
from ssmzoo.data.images import ImageData, ImageSamples
from ssmzoo.data.loader import Draw

CIFAR100 = """
29774,33344,4815,6772,48317 29918,33262,5138,7342,47874 28864,32471,4316,6436,47498 29802,33159,3730,5093,47740
30548,34549,2845,4996,47866 28855,32834,4603,6914,48126 29932,33300,3860,5424,47055 29434,32604,4609,6380,47844
30456,34217,4361,6550,46896 29664,32857,4923,7502,47270 31267,34427,4799,6611,47404 28509,31687,3477,5563,48003
29545,33412,5114,6808,47692 29209,33265,4131,6401,48102 31290,34432,6060,8451,48279 32337,35646,6022,9048,48584
30768,34394,5091,6510,48023 30310,33230,5098,6671,48349 29690,33490,4260,5916,47371 31173,34943,4517,6494,47689
30281,33894,3768,6113,48095 28913,32821,6172,8276,48004 31249,34088,5257,6961,47534 30404,34101,4985,6899,48115
31823,35148,3922,6548,48127 30815,34450,3481,5089,47913 31683,34591,5251,7608,47984 29837,33823,4615,6448,47752
31222,34079,5686,7919,48675 28567,32964,5009,6201,47039 29355,33909,3982,5389,47166 31058,35180,5177,6890,48032
31176,35098,5235,7861,47830 30874,34639,5266,7489,47323 29960,34050,4988,7434,48208 30463,34580,5230,6813,48605
31702,35249,5854,7765,48444 30380,34028,5211,7433,47988 31348,34021,4929,7033,47904 30627,33728,4895,6299,47507
"""


class FewShotImages(ImageData):
    """`ImageData` whose training and validation hold the base classes only; further classes come by `session`.

    base_classes  how many classes (in label order) are trained on first
    way, shot     new classes per session and training images of each
    few_shot      which images: "seed", "cec" (the field's list, CIFAR-100 only), or a text file, or a folder of them:
                  a line of `shot` indices in the training set per new class, or image files, one per line, of which
                  folder and name count (the field's session lists of CUB-200; those of base classes are passed over)
    Other arguments as in `ImageData`.
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
        base_classes: int = 6,
        way: int = 2,
        shot: int = 5,
        few_shot: str = "seed",
    ):
        super().__init__(
            dataset,
            path,
            val_path,
            val_fraction,
            split_seed,
            broken,
            image_size,
            in_chans,
            augment,
            crop_pct,
            batch_size,
            seed,
            num_workers,
        )
        if min(base_classes, way, shot) < 1:
            raise ValueError(f"data.base_classes = {base_classes}, way = {way} and shot = {shot} must be positive")
        self.base_classes, self.way, self.shot, self.few_shot = base_classes, way, shot, few_shot
        self._all: tuple[Images, Images] | None = None

    def _find(self) -> tuple[Images, Images]:
        self._all = super()._find()
        train, val = self._all
        novel = len(train.classes) - self.base_classes
        if novel < self.way or novel % self.way:
            raise ValueError(
                f"{len(train.classes)} classes minus data.base_classes = {self.base_classes} leave {novel}"
                f", which sessions of data.way = {self.way} classes do not divide"
            )
        return tuple(side.subset(np.flatnonzero(side.labels < self.base_classes)) for side in (train, val))

    @property
    def sessions(self) -> int:
        """Sessions after the base session."""
        return (len(self.classes) - self.base_classes) // self.way

    def seen(self, session: int) -> int:
        """Classes known after a session; 0 is the base session."""
        return self.base_classes + session * self.way

    def few_shot_indices(self) -> np.ndarray:
        """(novel classes, shot) indices in the whole training set."""
        labels, novel = self._all[0].labels, range(self.base_classes, len(self.classes))
        if self.few_shot == "seed":
            generator = np.random.default_rng(self.split_seed)
            short = [self.classes[c] for c in novel if (labels == c).sum() < self.shot]
            if short:
                raise ValueError(f"data.shot = {self.shot}: too few training images of {', '.join(short)}")
            return np.stack([generator.permutation(np.flatnonzero(labels == c))[: self.shot] for c in novel])
        text = CIFAR100 if self.few_shot == "cec" else self._index()
        if any(not set(row) <= set("0123456789,") for row in text.split()):
            return self._indices_of_files(text.splitlines())
        rows = [[int(n) for n in row.split(",")] for row in text.split()]
        if [len(row) for row in rows] != [self.shot] * len(novel):
            raise ValueError(f"data.few_shot = {self.few_shot}: expected {len(novel)} rows of {self.shot} numbers")
        indices = np.array(rows)
        wrong = [self.classes[c] for c, row in zip(novel, indices) if (labels[row] != c).any()]
        if wrong:
            raise ValueError(
                f"data.few_shot = {self.few_shot}: some images are not of the class of their row: "
                f"{', '.join(wrong[:5])}"
            )
        return indices

    def _index(self) -> str:
        path = Path(self.few_shot).expanduser()
        files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
        if not files or not all(f.is_file() for f in files):
            raise ValueError(
                f"data.few_shot = {self.few_shot}: no such file, and no folder with .txt files; choose "
                f"seed or cec, or give a list of images"
            )
        return "\n".join(f.read_text(encoding="utf-8") for f in files)

    def few_shot_places(self) -> np.ndarray:
        warnings.warn("few_shot_places is now called few_shot_indices", DeprecationWarning, stacklevel=2)
        return self.few_shot_indices()

    def _indices_of_files(self, lines: list[str]) -> np.ndarray:
        """The same from file names: their folder and name must be those of a training image."""
        train = self._all[0]
        if train.files is None:
            raise ValueError(f"data.few_shot = {self.few_shot} lists files, but {train.name} is no folder of images")
        indices = {tuple(Path(name).parts[-2:]): i for i, name in enumerate(train.files)}
        listed = [tuple(Path(line.split()[0]).parts[-2:]) for line in lines if line.strip()]
        unknown = ["/".join(name) for name in listed if name not in indices and name[0] in train.classes]
        if unknown:
            raise ValueError(
                f"data.few_shot = {self.few_shot}: {len(unknown)} files are not in {train.name}: "
                f"{', '.join(unknown[:5])}"
            )
        chosen = [indices[name] for name in listed if name in indices]
        rows = [[i for i in chosen if train.labels[i] == c] for c in range(self.base_classes, len(self.classes))]
        wrong = [
            f"{self.classes[self.base_classes + k]} {len(row)}" for k, row in enumerate(rows) if len(row) != self.shot
        ]
        if wrong:
            raise ValueError(
                f"data.few_shot = {self.few_shot}: data.shot = {self.shot}, but the list has another "
                f"number of images for: {', '.join(wrong[:5])}"
            )
        return np.array(rows)

    def images(self, which: str) -> tuple[Tensor, Tensor]:
        """Without augmentation: "base" training images, "few" (in order of class) or "test" images of all classes.

        Yields batches (image (b c y x), label (b)).
        """
        train, val = self._all
        chosen = {
            "base": lambda: self._open()[0],
            "few": lambda: train.subset(self.few_shot_indices().ravel()),
            "test": lambda: val,
        }[which]()
        samples = ImageSamples(chosen, self._transform(training=False), "L" if self.channels == 1 else "RGB")
        for start in range(0, len(samples), 128):
            items = [samples[Draw(i, 0)] for i in range(start, min(start + 128, len(samples)))]
            yield torch.stack([item["image"] for item in items]), torch.tensor([item["label"] for item in items])
