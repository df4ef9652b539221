"""Data modules for dense prediction: where scenes come from, augmentation, batches."""

from __future__ import annotations

from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import Dataset

from ssmzoo.data.dense.augment import for_detection, for_segmentation, resized, sample_of
from ssmzoo.data.dense.coco import chosen, coco, coco_files
from ssmzoo.data.dense.digits import digit_scenes
from ssmzoo.data.dense.masks import mask_folders
from ssmzoo.data.dense.scene import Scene, Scenes
from ssmzoo.data.images import IMAGENET, generators_kept, reseed
from ssmzoo.data.loader import Draw, ResumableLoader, refuse_other_data
from ssmzoo.suggest import check_slot, nearest

LAYOUTS = ("auto", "digits", "folder", "coco")


class DenseData(LightningDataModule):
    """What both kinds share.

    path          folder of images and masks (ADE20K's layout among them), COCO's layout, or a COCO JSON file; None:
                  real digits pasted on the embedded photographs, drawn by seed
    val_path      the same to validate on; None: the path's own validation side, or a share held out by name
    layout        "auto", "digits", "folder" (images and masks) or "coco"
    val_fraction  that share (of the digits, too);  split_seed  decides who is held out
    image_size    side of the embedded scenes;  train_scenes, val_scenes  how many an epoch and a validation have
    broken        "refuse" or "skip" boxes that are impossible
    batch_size    pictures per step and process

    Raises ValueError for whatever cannot be read or does not fit together.
    """

    semantic = True  # a class per pixel, or objects?
    AUGMENT: tuple[str, ...] = ()
    collate = None  # list of samples -> batch; None: torch's

    def __init__(
        self,
        path: str | None = None,
        val_path: str | None = None,
        layout: str = "auto",
        val_fraction: float = 0.2,
        split_seed: int = 0,
        image_size: int = 64,
        train_scenes: int = 2000,
        val_scenes: int = 200,
        broken: str = "refuse",
        augment: dict | None = None,
        batch_size: int = 16,
        seed: int = 0,
        num_workers: int = 0,
    ):
        super().__init__()
        if layout not in LAYOUTS:
            raise ValueError(f"data.layout = '{layout}'{nearest(layout, LAYOUTS)}; choose one of {', '.join(LAYOUTS)}")
        if broken not in ("refuse", "skip"):
            raise ValueError(f"data.broken = '{broken}'; choose refuse or skip")
        if path is None and layout not in ("auto", "digits"):
            raise ValueError(f"data.layout={layout} needs data.path=<folder>")
        if image_size < 32 or min(train_scenes, val_scenes) < 1:
            raise ValueError(
                f"data.image_size = {image_size} must be at least 32, data.train_scenes = {train_scenes} and "
                f"data.val_scenes = {val_scenes} at least 1"
            )
        check_slot("data.augment", augment, self.AUGMENT, "data.augment")
        self.path, self.val_path, self.layout = path, val_path, layout
        self.val_fraction, self.split_seed, self.image_size = val_fraction, split_seed, image_size
        self.train_scenes, self.val_scenes, self.broken = train_scenes, val_scenes, broken
        self.augment = dict(augment or {})
        self.batch_size, self.seed, self.num_workers = batch_size, seed, num_workers
        self._sides: tuple[Scenes, Scenes] | None = None

    # Lightning's hooks

    def setup(self, stage: str | None = None) -> None:
        self.sides()

    def train_dataloader(self) -> ResumableLoader:
        return self._loader(0)

    def val_dataloader(self) -> ResumableLoader:
        return self._loader(1)

    def state_dict(self) -> dict:
        return {"scenes": self.sides()[0].fingerprint, "seed": self.seed}

    def load_state_dict(self, state: dict) -> None:
        refuse_other_data(self, state)

    # What others may ask

    def sides(self) -> tuple[Scenes, Scenes]:
        """(training, validation), opened once."""
        if self._sides is None:
            self._sides = self._open()
            for note in dict.fromkeys(note for side in self._sides for note in side.notes):
                print(f"warning: {note}", flush=True)
        return self._sides

    @property
    def classes(self) -> list[str]:
        return self.sides()[0].classes

    @property
    def sizes(self) -> dict[str, int]:
        return {
            "in_chans": 3,
            "num_classes": len(self.classes),
            "img_size": self.augment.get("crop") or self.image_size,
        }

    crop_pct = 1.0

    @property
    def picture_size(self) -> int:
        """Short side that pictures are predicted at; 0: their own."""
        return self.image_size if self.found_layout() == "digits" else 0

    def normalisation(self):
        """Mean and deviation that images are normalised with: ImageNet's."""
        return IMAGENET

    def describe(self) -> dict:
        train, val = self.sides()
        return {
            "dataset": train.name,
            "fingerprint": train.fingerprint,
            "classes": len(train.classes),
            "train_images": len(train),
            "val_images": len(val),
        }

    # How it is done

    def found_layout(self) -> str:
        """What `auto` stands for."""
        if self.layout != "auto":
            return self.layout
        if self.path is None:
            return "digits"
        if not Path(self.path).expanduser().exists():
            raise ValueError(f"data.path = '{self.path}' does not exist")
        return "coco" if coco_files(self.path) else "folder"

    def _open(self) -> tuple[Scenes, Scenes]:
        layout = self.found_layout()
        if layout == "digits":
            return digit_scenes(self.image_size, self.train_scenes, self.val_scenes, self.val_fraction, self.split_seed)
        if layout == "coco":
            how = (self.broken, self.semantic, self.val_fraction, self.split_seed)
            return coco(self.path, self.val_path, *how)
        return self._folder()

    def _folder(self) -> tuple[Scenes, Scenes]:
        raise ValueError(
            f"{self.path} holds masks of classes, which name no single objects; detection needs COCO's annotations "
            f"(annotations/*.json)"
        )

    def _loader(self, which: int) -> ResumableLoader:
        trainer, shuffle = self.trainer, which == 0
        rank, world = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        samples, batch_size = self._samples(which), self.batch_size
        if shuffle and 0 < len(samples) // world < batch_size:
            batch_size = len(samples) // world
            print(f"warning: batches of {batch_size}: there are no more training pictures per process", flush=True)
        return ResumableLoader(
            samples,
            batch_size if shuffle else self._val_batch(),
            shuffle=shuffle,
            drop_last=shuffle,
            seed=self.seed,
            num_workers=self.num_workers if shuffle else 0,
            rank=rank,
            world_size=world,
            collate_fn=self.collate,
        )

    def _val_batch(self) -> int:
        """Pictures of one size go together."""
        return self.batch_size if self.found_layout() == "digits" else 1


class Samples(Dataset):
    """`dataset[Draw(index, seed)]` -> what `prepare(scene)` makes of it; random choices follow from the seed."""

    def __init__(self, scenes: Scenes, prepare):
        self.scenes, self.prepare = scenes, prepare

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, draw: Draw) -> dict:
        with generators_kept():
            reseed(draw.seed)
            return self.prepare(self.scenes.read(draw.index, draw.seed))


class SegmentationData(DenseData):
    """Pictures with a class for every pixel. A batch is {"image" (b 3 y x) normalised, "classes" (b y x), "name"}.

    classes            how many, or their names; None: by the layout, classes.txt or the largest id
    ignore             id of pixels that nothing is said of
    reduce_zero_label  0 is ignored too and the ids begin at 1; None: for ADE20K's layout
    augment            scale [from, to] (a random factor), resize [long, short] (fitted into it first), crop (side),
                       max_share (of one class in a crop), hflip, photometric
    val_size           short side that pictures are validated at (predictions are judged at their own size); None: own
    Other arguments as in `DenseData`.
    """

    default_task = "segmentation"
    AUGMENT = ("scale", "resize", "crop", "max_share", "hflip", "photometric")

    def __init__(
        self,
        path: str | None = None,
        val_path: str | None = None,
        layout: str = "auto",
        classes: int | list[str] | None = None,
        ignore: int = 255,
        reduce_zero_label: bool | None = None,
        val_size: int | None = None,
        val_fraction: float = 0.2,
        split_seed: int = 0,
        image_size: int = 64,
        train_scenes: int = 2000,
        val_scenes: int = 200,
        broken: str = "refuse",
        augment: dict | None = None,
        batch_size: int = 16,
        seed: int = 0,
        num_workers: int = 0,
    ):
        super().__init__(
            path,
            val_path,
            layout,
            val_fraction,
            split_seed,
            image_size,
            train_scenes,
            val_scenes,
            broken,
            augment,
            batch_size,
            seed,
            num_workers,
        )
        if path is not None and not self.augment.get("crop") and batch_size > 1:
            raise ValueError("pictures of a folder differ in size: set data.augment.crop=<side> for batches of them")
        self.named, self.ignore, self.reduce_zero_label, self.val_size = classes, ignore, reduce_zero_label, val_size

    @property
    def picture_size(self) -> int:
        return self.val_size or super().picture_size

    def _folder(self) -> tuple[Scenes, Scenes]:
        how = (self.named, self.ignore, self.reduce_zero_label, self.val_fraction, self.split_seed)
        return mask_folders(self.path, self.val_path, *how)

    def _open(self) -> tuple[Scenes, Scenes]:
        train, val = super()._open()
        if self.found_layout() == "digits":
            train.classes = val.classes = ["background", *train.classes]
        return train, val

    def _samples(self, which: int) -> Samples:
        return Samples(self.sides()[which], self.training_sample if which == 0 else self.validation_sample)

    def training_sample(self, scene: Scene) -> dict:
        return self._normalised(for_segmentation(sample_of(scene, objects=False), self.augment), scene.name)

    def validation_sample(self, scene: Scene) -> dict:
        """The picture at `val_size`, its classes at their own size."""
        sample = sample_of(scene, objects=False)
        classes, own = sample.pop("classes"), min(scene.image.shape[:2])
        sample = resized(sample, self.val_size / own) if self.val_size else sample
        return self._normalised(sample | {"classes": classes}, scene.name)

    def _normalised(self, sample: dict, name: str) -> dict:
        mean, std = (torch.tensor(v).view(-1, 1, 1) for v in self.normalisation())
        image = (sample["image"].as_subclass(torch.Tensor).float() / 255 - mean) / std
        return {"image": image, "classes": sample["classes"].as_subclass(torch.Tensor), "name": name}

    def levels(self, image: torch.Tensor) -> torch.Tensor:
        """Undo the normalisation: (... 3 y x) -> values in [0, 1], for pictures."""
        mean, std = (image.new_tensor(v).view(-1, 1, 1) for v in self.normalisation())
        return (image * std + mean).clamp(0, 1)


def lists(samples: list[dict]) -> dict[str, list]:
    """Samples whose pictures and objects differ in size stay lists."""
    return {key: [sample[key] for sample in samples] for key in samples[0]}


class DetectionData(DenseData):
    """Pictures with objects. A batch is {"image": list of (3 y x) in [0, 1], "target": list of dicts, "name": list}; a
    target has boxes (n 4) x0 y0 x1 y1, labels (n) from 0, masks (n y x) uint8; and in validation crowd (n) bool.

    augment     hflip; crops: true (in half of the cases another resize and a crop, the recipe of 3x schedules)
    keep_empty  train on pictures without objects, too
    Other arguments as in `DenseData`.
    """

    semantic = False
    default_task = "detection"
    AUGMENT = ("hflip", "crops")

    def __init__(
        self,
        path: str | None = None,
        val_path: str | None = None,
        layout: str = "auto",
        keep_empty: bool = False,
        val_fraction: float = 0.2,
        split_seed: int = 0,
        image_size: int = 64,
        train_scenes: int = 2000,
        val_scenes: int = 200,
        broken: str = "refuse",
        augment: dict | None = None,
        batch_size: int = 16,
        seed: int = 0,
        num_workers: int = 0,
    ):
        super().__init__(
            path,
            val_path,
            layout,
            val_fraction,
            split_seed,
            image_size,
            train_scenes,
            val_scenes,
            broken,
            augment,
            batch_size,
            seed,
            num_workers,
        )
        self.keep_empty = keep_empty

    def _open(self) -> tuple[Scenes, Scenes]:
        train, val = super()._open()
        if train.occupied is None or self.keep_empty:
            return train, val
        if not train.occupied:
            raise ValueError(f"no picture of {train.name} has an object; there is nothing to learn from")
        empty = len(train) - len(train.occupied)
        if empty:
            train = chosen(train, train.occupied)
            train.notes = [*train.notes, f"{empty} training pictures without objects are left out (data.keep_empty)"]
        return train, val

    def _samples(self, which: int) -> Samples:
        return Samples(self.sides()[which], self.training_sample if which == 0 else self.validation_sample)

    def training_sample(self, scene: Scene) -> dict:
        return self._finished(for_detection(sample_of(scene, objects=True), self.augment), scene.name)

    def validation_sample(self, scene: Scene) -> dict:
        """Crowds included, which count neither as found nor as missed."""
        return self._finished(sample_of(scene, objects=True, crowds=True), scene.name)

    @staticmethod
    def _finished(sample: dict, name: str) -> dict:
        kept = [k for k in ("boxes", "labels", "masks", "crowd") if k in sample]
        target = {k: sample[k].as_subclass(torch.Tensor) for k in kept}
        return {"image": sample["image"].as_subclass(torch.Tensor).float() / 255, "target": target, "name": name}

    collate = staticmethod(lists)
