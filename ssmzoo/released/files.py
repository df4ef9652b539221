"""Reading files of weights: safetensors, and torch's pickles without running anything from them."""

from __future__ import annotations

import json
import re
import zipfile
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssmzoo.released.gguf import read_gguf
from ssmzoo.released.unpickle import Record, Refused, read_archive

WRAPPERS = ("params_ema", "params", "state_dict", "model_state_dict", "model", "model_ema")  # what scripts put around
STANDARD = ("model.safetensors", "pytorch_model.bin")  # what transformers and mamba_ssm call the one file of a folder
SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".gguf")
BESIDE = re.compile(r"(optimizer|scheduler|scaler|rng_state|random_states|training_args|trainer)[\w.-]*$")  # no weights
SHARD = re.compile(r"(.+)-(\d+)-of-(\d+)(\.\w+)$")


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged or does not fit; the message says which and what to do."""


class WeightFile(NamedTuple):
    """Tensors by name, the wrapper they stood in ("" without one), and what else the file holds, by name."""

    state: dict[str, Tensor]
    wrapper: str
    beside: dict[str, Any]


def read_state_dict(path: str | Path, wrappers: Sequence[str] = WRAPPERS) -> dict[str, Tensor]:
    """Tensors of a .safetensors, .pth, .pt, .bin, .ckpt or .gguf file, or of a folder that holds one checkpoint.

    wrappers  the containers that training scripts put around a state dict, the one to take first. They may be nested;
              `module.` of torch's DataParallel is cut off.

    No code from the file runs. Raises CheckpointError.
    """
    return read_weight_file(path, wrappers).state


def read_weight_file(path: str | Path, wrappers: Sequence[str] = WRAPPERS) -> WeightFile:
    """As `read_state_dict`, with what stood around the tensors."""
    path = Path(path).expanduser()
    if not path.exists():
        raise CheckpointError(f"no checkpoint at {path}{_hub_hint(path)}")
    if path.is_dir():
        parts = [read_weight_file(file, wrappers) for file in weight_files(path)]
        state = {key: value for part in parts for key, value in part.state.items()}
        return WeightFile(state, parts[0].wrapper, parts[0].beside)
    content, opened = read_content(path), []
    while key := next((k for k in wrappers if isinstance(content, dict) and isinstance(content.get(k), dict)), None):
        beside = {name: value for name, value in content.items() if name != key}
        content, opened = content[key], [*opened, (key, beside)]
    if type(content) not in (dict, OrderedDict) or not content:
        raise CheckpointError(f"{path} does not hold a plain mapping from names to tensors{_holds(content)}")
    odd = next((key for key, value in content.items() if not isinstance(value, Tensor)), None)
    if odd is not None:
        raise CheckpointError(f"{path} does not hold a plain mapping from names to tensors: {odd!r} is none")
    state = {str(key).removeprefix("module."): value for key, value in content.items()}
    return WeightFile(state, ".".join(key for key, _ in opened), opened[0][1] if opened else {})


def _holds(content: Any) -> str:
    if isinstance(content, Record):
        return f": it holds an object of {content.name}; save its state_dict() instead"
    if isinstance(content, dict):
        return f": it holds {', '.join(map(str, list(content)[:6])) or 'nothing'}"
    return f": it holds a {type(content).__name__}"


def _hub_hint(path: Path) -> str:
    """A name such as state-spaces/mamba-130m is one of the hub's, not a path here."""
    return " (the name of a repository? download it first)" if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) else ""


def read_content(path: Path) -> Any:
    """What a file of weights holds, before any wrapper is opened."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        if path.suffix == ".gguf":
            return read_gguf(path)
        refuse_zip_bomb(path)
        if zipfile.is_zipfile(path):
            return read_archive(path)
        if is_cut_off(path):
            raise CheckpointError(
                f"{path} cannot be read as a checkpoint (cut off or damaged?): its last part is missing"
            )
        return torch.load(path, map_location="cpu", weights_only=True)  # the form before torch 1.6, or damaged
    except CheckpointError:
        raise
    except Refused as error:
        raise CheckpointError(f"{path} was refused: {error}") from None
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        reason = str(error).partition(". This is an internal")[0]  # torch goes on about its own zip reader
        raise CheckpointError(f"{path} cannot be read as a checkpoint (cut off or damaged?): {reason}") from None
    except UnpicklingError:
        raise CheckpointError(f"{path} was refused: it is no file of weights that torch.save wrote") from None
    except Exception as error:  # safetensors has types of its own, a damaged pickle raises any
        reason = (str(error).splitlines() or [""])[0]
        if path.suffix == ".safetensors":
            raise CheckpointError(f"{path} cannot be read as a checkpoint (cut off or damaged?): {reason}") from None
        raise CheckpointError(f"{path} was refused: {type(error).__name__}: {reason}") from None


def weight_files(folder: Path) -> list[Path]:
    """The files of the one checkpoint in a folder: the standard name, the shards of an index, or the only one there."""
    for name in STANDARD:
        if (folder / name).is_file():
            return [folder / name]
        if (folder / f"{name}.index.json").is_file():
            return _all_there(folder, sorted(_index(folder / f"{name}.index.json")))
    found = [p for p in sorted(folder.iterdir()) if p.suffix in SUFFIXES and p.is_file() and not BESIDE.match(p.name)]
    if not found:
        runs = [path.name for path in sorted(folder.iterdir()) if (path / "checkpoints").is_dir()]
        more = f"; it holds runs, name one: {', '.join(runs[:8])}" if runs else ""
        raise CheckpointError(f"{folder} holds no .safetensors, .bin, .pth or .pt file of weights{more}")
    shards = {m.group(1, 3, 4) for p in found if (m := SHARD.fullmatch(p.name))}
    if len(shards) == 1 and all(SHARD.fullmatch(p.name) for p in found):
        (stem, count, suffix) = shards.pop()
        names = [f"{stem}-{i:0{len(count)}d}-of-{count}{suffix}" for i in range(1, min(int(count), 10_000) + 1)]
        return _all_there(folder, names)
    if len(found) == 1:
        return found
    names = ", ".join(p.name for p in found[:8])
    raise CheckpointError(f"{folder} holds {len(found)} checkpoints; name the file that is meant: {names}")


def _index(path: Path) -> set[str]:
    """The files, beside it, that a transformers' index.json spreads a checkpoint over."""
    try:
        files = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
        plain = all(Path(name).name == name for name in files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is no index of shards: {error!r}") from None
    if not plain or not files:
        raise CheckpointError(f"{path} names files outside its folder, or none: refused")
    return files


def _all_there(folder: Path, names: list[str]) -> list[Path]:
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        raise CheckpointError(f"{folder} is incomplete: it lacks {', '.join(missing[:4])}{more} of {len(names)} shards")
    return [folder / name for name in names]


def is_cut_off(path: Path) -> bool:
    """Does a file begin as torch.save's archives do? (One that is whole has been recognised by its end.)"""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def refuse_zip_bomb(path: Path) -> None:
    """torch stores tensors uncompressed; a file that unpacks to more than it weighs was not written by torch.save."""
    if not zipfile.is_zipfile(path):
        return  # cut off, or of a form older than zip: torch.load says which
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
    if unpacked > 1.2 * path.stat().st_size + (1 << 20):
        raise CheckpointError(f"{path} would unpack to {unpacked:,} bytes from {path.stat().st_size:,}: refused")
