"""A trained model with what it needs to be used: class names, preparation of pictures, tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ssmzoo.inference.export.source import read_source
from ssmzoo.presets import config_names
from ssmzoo.released.catalogue import Picture, Weights, catalogue, find_weights, split_name
from ssmzoo.released.download import fetch_tokenizer
from ssmzoo.released.pretrained import build_pretrained
from ssmzoo.suggest import nearest

IMAGENET_CLASSES = 1000


@dataclass
class Subject:
    """A model in eval mode.

    classes    names by index, [] where none are known (then a class is called by its number)
    picture    how pictures are prepared;  tokenizer  of a language model, or None
    manifest   what a run recorded, {} for released weights
    """

    name: str
    model: nn.Module
    classes: Sequence[str] = ()
    picture: Picture = field(default_factory=Picture)
    tokenizer: Any = None
    manifest: dict[str, Any] = field(default_factory=dict)

    def class_name(self, index: int) -> str:
        return self.classes[index] if index < len(self.classes) else str(index)


def load_subject(name: str, device: str | None = None) -> Subject:
    """The subject of a run folder, a checkpoint, a released file or folder, or the name of released weights.

    Raises ValueError (CheckpointError, DownloadError) for a name that is neither, and for files that cannot be used.
    """
    if Path(name).expanduser().exists():
        subject = from_path(name)
    elif name in catalogue() or split_name(name)[0] in config_names("model"):
        subject = from_released(find_weights(*split_name(name)))
    else:
        known = [*catalogue(), *config_names("model")]
        raise ValueError(
            f"no run, checkpoint or model {name!r}{nearest(name, known)} (`ssmzoo weights list` names all)"
        )
    subject.model.eval().to(device or "cpu")
    return subject


def from_path(path: str) -> Subject:
    """What a checkpoint's manifest says; of one that is older than class names, what its configuration says. A released
    file says nothing: its tokenizer.json may lie beside it, pictures are prepared in ImageNet's usual way."""
    source = read_source(path)
    classes = source.manifest.get("classes") or (() if source.manifest else known_names(source.model))
    tokenizer = source.tokenizer or tokenizer_beside(Path(path).expanduser())
    model = source.model.float()  # files of 16 bits are computed with in 32
    return Subject(path, model, classes, picture_of(source.manifest), tokenizer, source.manifest)


def tokenizer_beside(path: Path) -> Any:
    file = (path if path.is_dir() else path.parent) / "tokenizer.json"
    if not file.is_file():
        return None
    from ssmzoo.data.text_tokenizer import JsonTokenizer

    return JsonTokenizer.from_file(file)


def picture_of(manifest: dict) -> Picture:
    if not manifest:
        return Picture()
    noted = manifest.get("picture")
    if isinstance(noted, dict):
        known = {key: tuple(v) if isinstance(v, list) else v for key, v in noted.items() if key in vars(Picture())}
        return Picture(**known)
    config = manifest.get("config", {})
    data = config.get("data") or {}
    size, crop = data.get("image_size") or 32, data.get("crop_pct") or 1.0
    if config["model"].get("in_chans") == 1:
        return Picture(size, crop, (0.5,), (0.5,))
    return Picture(size, crop)


def from_released(entry: Weights) -> Subject:
    model = build_pretrained(entry).eval()
    classes = known_names(model) if entry.picture else ()
    tokenizer = None
    if entry.tokenizer:
        from ssmzoo.data.text_tokenizer import JsonTokenizer

        tokenizer = JsonTokenizer.from_file(fetch_tokenizer(entry.tokenizer))
    return Subject(entry.name, model, classes, entry.picture or Picture(), tokenizer)


def known_names(model: nn.Module) -> list[str]:
    """The 1000 classes of ImageNet-1k in timm's words for a classifier of so many; [] for others and without timm."""
    if getattr(model, "num_classes", 0) != IMAGENET_CLASSES:
        return []
    from ssmzoo._torchvision import make_importable

    try:
        make_importable()
        from timm.data import ImageNetInfo
    except ImportError:
        return []
    info = ImageNetInfo("imagenet-1k")
    return [info.index_to_description(i) for i in range(IMAGENET_CLASSES)]
