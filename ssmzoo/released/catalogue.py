"""Released weights by name: what each family's `CATALOGUE` says about its files.

A name is a preset's, with a tag where one preset serves several files: `vmamba_tiny`, `mambair_denoise.sigma25`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ssmzoo.released.family import families, find
from ssmzoo.released.files import WRAPPERS
from ssmzoo.suggest import nearest

NEOX = "EleutherAI/gpt-neox-20b"


@dataclass(frozen=True)
class Hub:
    """A file of a repository on the Hugging Face hub, at a commit where one is pinned."""

    repo: str
    file: str
    revision: str = "main"

    def __str__(self) -> str:
        return f"hf:{self.repo}/{self.file}@{self.revision}"


@dataclass(frozen=True)
class Asset:
    """A file behind a URL, such as an asset of a GitHub release."""

    url: str

    def __str__(self) -> str:
        return self.url


@dataclass(frozen=True)
class ByHand:
    """A file that a person has to fetch: where it is and what to do."""

    link: str
    todo: str

    def __str__(self) -> str:
        return f"by hand: {self.link}"


def on_drive(key: str) -> ByHand:
    """A file on Google Drive, which asks a browser to confirm."""
    link = f"https://drive.google.com/file/d/{key}/view"
    return ByHand(link, "Download it in a browser, then `ssmzoo weights fetch NAME --file PATH`")


@dataclass(frozen=True)
class Picture:
    """How a classifier's pictures were prepared: RGB, shorter side resized to size / crop, centre crop of size."""

    size: int = 224
    crop: float = 0.875
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    interpolation: str = "bicubic"


@dataclass(frozen=True)
class Weights:
    """One released file.

    preset     the model of ours that it belongs to;  tag  which of several files of that preset, "" for the usual one
    licence    of the weights; None where the publisher states none
    bytes      size of the file;  sha256  as published; None where it is not, then the first download is recorded
    arguments  the official class's constructor arguments that the tensors do not tell;  model  those of our preset that
               the file needs changed
    picture    preparation of a classifier's pictures;  tokenizer  repository of a language model's tokenizer
    metric     as published, with the name of the data
    """

    preset: str
    source: Hub | Asset | ByHand
    tag: str = ""
    licence: str | None = None
    bytes: int | None = None
    sha256: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    picture: Picture | None = None
    tokenizer: str | None = None
    metric: str = ""
    note: str = ""
    family: str = field(default="", compare=False)  # filled in by `catalogue`

    @property
    def name(self) -> str:
        return f"{self.preset}.{self.tag}" if self.tag else self.preset

    @property
    def wrappers(self) -> tuple[str, ...]:
        """Which container of the file holds the published weights, the first that is there."""
        return find(self.family, "WRAPPERS") or WRAPPERS


@functools.cache
def catalogue() -> dict[str, Weights]:
    """{name: entry} of every family."""
    found = {}
    for family in families("CATALOGUE"):
        for entry in find(family, "CATALOGUE"):
            entry = Weights(**{**vars(entry), "family": family})
            if entry.name in found:
                raise ValueError(f"two files are called {entry.name!r}, of {found[entry.name].family} and {family}")
            found[entry.name] = entry
    return found


def entries_of(preset: str) -> list[Weights]:
    return [entry for entry in catalogue().values() if entry.preset == preset]


def split_name(name: str) -> tuple[str, str]:
    """(preset, tag) of a name with or without tag; names of presets may have dots of their own (mamba_1.4b)."""
    if entry := catalogue().get(name):
        return entry.preset, entry.tag
    preset, dot, tag = name.rpartition(".")
    return (preset, tag) if dot and entries_of(preset) else (name, "")


def find_weights(preset: str, tag: str | bool = "") -> Weights:
    """The entry of a preset. Raises ValueError when there is none, or when several would fit and no tag says which."""
    found = entries_of(preset)
    if not found:
        known = sorted({entry.preset for entry in catalogue().values()})
        raise ValueError(
            f"no released weights are known for {preset!r}{nearest(preset, known)}; `ssmzoo weights list` prints all; "
            f"weights of your own: create_model({preset!r}, checkpoint=PATH)"
        )
    wanted = "" if tag is True else tag
    for entry in found:
        if entry.tag == wanted:
            return entry
    tags = [entry.tag or "(none)" for entry in found]
    if not wanted:
        raise ValueError(f"{preset} has several released files; choose one: {', '.join(e.name for e in found)}")
    raise ValueError(f"{preset} has no released file {wanted!r}{nearest(wanted, tags)}; tags: {', '.join(tags)}")
