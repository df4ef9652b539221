"""What is exported: a model with its weights and what is known about where it comes from."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ssmzoo.checkpoint_files import INDEX, MANIFEST
from ssmzoo.data.text_tokenizer import Tokenizer, from_dict
from ssmzoo.layers.image.backbone import ImageBackbone
from ssmzoo.released.catalogue import catalogue
from ssmzoo.released.config_json import arguments_of
from ssmzoo.released.family import families, find
from ssmzoo.released.load import argument_names, load_official, read
from ssmzoo.released.pretrained import build_pretrained
from ssmzoo.zoo import QUANTISATION, load_model


class Source(NamedTuple):
    """model in eval mode; manifest of the run, {} for a released file; origin: the path it was read from."""

    model: nn.Module
    manifest: dict[str, Any]
    origin: str

    @property
    def name(self) -> str:
        return self.manifest.get("model") or self.origin

    @property
    def node(self) -> dict[str, Any] | None:
        """Class and constructor arguments, where a run recorded them."""
        return self.manifest.get("config", {}).get("model")

    @property
    def quantisation(self) -> dict[str, Any] | None:
        """The form of a model of integers, where a run recorded one."""
        return self.manifest.get(QUANTISATION)

    @property
    def tokenizer(self) -> Tokenizer | None:
        saved = self.manifest.get("tokenizer")
        return None if saved is None else from_dict(saved)

    @property
    def cls(self) -> type[nn.Module] | None:
        """The zoo's class, of which a loaded official model may be a subclass; None for a part of a model."""
        return next((c for c in type(self.model).__mro__ if c.__module__.startswith("ssmzoo.models.")), None)

    @property
    def kind(self) -> str | None:
        """language, image or restoration: what goes in and comes out; None for anything else."""
        if self.cls is None:
            return None
        if isinstance(self.model, ImageBackbone):
            return "image"
        if hasattr(self.model, "upscale"):
            return "restoration"
        return "language" if any(isinstance(m, nn.Embedding) for m in self.model.modules()) else None


def read_source(path: str | Path) -> Source:
    """A run folder, a checkpoint of ours, a released file or folder, or released weights by name. Raises
    CheckpointError."""
    if not Path(path).expanduser().exists() and (entry := catalogue().get(str(path))):
        return Source(build_pretrained(entry).eval(), {}, entry.name)
    path = Path(path).expanduser()
    if not path.exists() or is_ours(path):
        model, manifest = load_model(path)
        return Source(model, manifest, str(path))
    family, state, config = read(None, path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of the type in the file: it is kept
        model = load_official(family, state, **arguments_of(family, config, argument_names(family)))
    types = {value.dtype for value in state.values() if value.is_floating_point()}
    return Source(model.to(types.pop()) if len(types) == 1 else model, {}, str(path))


def is_ours(path: Any) -> bool:
    """Is it a run folder, a checkpoint folder or a file inside one?"""
    folder = Path(path).expanduser() if isinstance(path, (str, Path)) else None
    folder = folder.parent if folder is not None and folder.is_file() else folder
    return folder is not None and any((folder / name).exists() for name in (MANIFEST, INDEX, "checkpoints"))


def family_of_class(cls: type | None, attribute: str = "official") -> str | None:
    """The family whose file maps this class of ours, the one of the class's own name first; None without one.

    attribute  that the family's file must have: MODEL_TYPE for the layouts of transformers
    """
    found = [name for name in families(attribute) if cls in (find(name, "MODELS") or ())]
    own = "" if cls is None else cls.__module__.rpartition(".")[2]
    return own if own in found else next(iter(found), None)


def contiguous(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that share no memory, on the CPU: what safetensors wants."""
    return {key: value.detach().cpu().clone().contiguous() for key, value in state.items()}


def save_tensors(state: dict[str, Tensor], path: Path) -> None:
    """A .safetensors file, or torch's form for any other suffix."""
    from safetensors.torch import save_file

    state = contiguous(state)
    if path.suffix == ".safetensors":
        save_file(state, path, {"format": "pt"})
    else:
        torch.save(state, path)
