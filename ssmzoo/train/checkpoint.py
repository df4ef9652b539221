"""Checkpoints as folders: weights as safetensors, a readable manifest, and the trainer's state.

    <run>/checkpoints/step-000200/model.safetensors   weights only, the model's own names
                                  manifest.json       model name, config, versions, data, metrics, SHA-256 of files
                                  trainer.ckpt        optimiser, loops, loader and random states (weights_only pickle)
    <run>/checkpoints/index.json                      which of them is last, which are best

A checkpoint is written under a temporary name, flushed to disk and renamed to a name that no other has; index.json then
points to it. So at every moment what the index names is whole. Loading runs no code from the files.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import CheckpointIO
from torch import Tensor, nn

from ssmzoo.released.files import CheckpointError, read_state_dict, refuse_zip_bomb
from ssmzoo.released.load import fit_state_dict
from ssmzoo.zoo import build_model

WEIGHTS, MANIFEST, TRAINER, INDEX = "model.safetensors", "manifest.json", "trainer.ckpt", "index.json"
FORMAT = 1
LARGEST_JSON = 64 << 20  # bytes; a manifest holds a configuration and perhaps a tokenizer


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(file)


def _sha256(file) -> str:  # Python 3.10
    digest = hashlib.sha256()
    for block in iter(lambda: file.read(1 << 20), b""):
        digest.update(block)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Replace a small file in one step, flushed to disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        _flush(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _untie(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Contiguous tensors that share no memory, and {left out name: name of the tensor it equals}."""
    first: dict[tuple, str] = {}
    kept, tied = {}, {}
    for name, tensor in state.items():
        place = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
        if tensor.numel() and place in first:
            tied[name] = first[place]
        else:
            first[place] = name
            kept[name] = tensor.detach().cpu().contiguous()
    return kept, tied


def write_checkpoint(
    folder: str | Path, weights: Mapping[str, Tensor], manifest: dict, trainer_state: dict | None = None
) -> Path:
    """Write a checkpoint folder in one step: either the whole of it appears or nothing.

    Raises FileExistsError when the folder is there already (the old one would be lost for a moment), OSError when it
    cannot be written, whatever the libraries below call that.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} is there already; a checkpoint is never written over")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        kept, tied = _untie(weights)
        _save_tensors(temporary, kept, trainer_state)
        files = {f.name: sha256(f) for f in sorted(temporary.iterdir())}
        content = {"format": FORMAT, **manifest, "tied": tied, "files": files}
        (temporary / MANIFEST).write_text(json.dumps(content, indent=1, allow_nan=True), encoding="utf-8")
        for file in temporary.iterdir():
            _flush(file)
        _flush(temporary)
        os.rename(temporary, folder)
        _flush(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _save_tensors(folder: Path, weights: dict[str, Tensor], trainer_state: dict | None) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
        if trainer_state is not None:
            torch.save(trainer_state, folder / TRAINER)
    except (RuntimeError, SafetensorError) as error:  # what a full disk is called there
        raise OSError(_first_line(error)) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def remove_leftovers(store: Path) -> None:
    """Delete what a killed process left half written in a folder of checkpoints."""
    for pattern in (".step-*.tmp", f".{INDEX}.*.tmp"):
        for path in Path(store).glob(pattern):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def last_good_checkpoint(run_dir: Path) -> Path | None:
    """The newest checkpoint of a run that is whole; None when the run never wrote one.

    A damaged one is named and passed over. Raises CheckpointError when that leaves none.
    """
    store = Path(run_dir) / "checkpoints"
    if not (store / INDEX).exists():
        return None
    index = read_json(store / INDEX)
    others = {*index.get("recent", []), *(b["name"] for b in index.get("best", []))} - {index.get("last")}
    problems = []
    for name in [n for n in (index.get("last"), *sorted(others, reverse=True)) if n is not None]:
        try:
            folder = _inside(store, name)
            if TRAINER not in read_manifest(folder).get("files", {}):
                continue  # weights only
        except CheckpointError as error:
            problems.append(str(error))
            continue
        for problem in problems:
            print(f"warning: {problem}; going back to {folder.name}", flush=True)
        return folder
    if problems:
        raise CheckpointError("; ".join(problems))
    return None


def find_checkpoint(path: str | Path, prefer: str = "best") -> Path:
    """The checkpoint folder meant by a run folder, a checkpoint folder or a file inside one.

    prefer  "best" or "last", for run folders. Raises CheckpointError.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise CheckpointError(f"no checkpoint or run folder at {path}")
    if path.is_file():
        path = path.parent
    if (path / MANIFEST).exists():
        return path
    store = path if (path / INDEX).exists() else path / "checkpoints"
    if not (store / INDEX).exists():
        raise CheckpointError(
            f"{path} is neither a run folder (with checkpoints/{INDEX}) nor a checkpoint ({MANIFEST})"
        )
    index = read_json(store / INDEX)
    name = index["best"][0]["name"] if prefer == "best" and index.get("best") else index.get("last")
    return _inside(store, name)


def _plain(name) -> bool:
    """Is this the name of a file or folder, and no path to elsewhere?"""
    return isinstance(name, str) and Path(name).name == name and name not in ("", ".", "..")


def _inside(store: Path, name) -> Path:
    """The checkpoint that an index names, which must lie beside the index."""
    if not _plain(name) or not (store / name / MANIFEST).exists():
        raise CheckpointError(f"{store / INDEX} names the checkpoint {name!r}, which is not a folder beside it")
    return store / name


def read_json(path: Path) -> dict:
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise CheckpointError(f"{path} has {path.stat().st_size:,} bytes, more than {LARGEST_JSON:,}: refused")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read (cut off or damaged?): {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return content


def read_manifest(folder: Path) -> dict:
    """The manifest of a checkpoint folder, with the files it lists checked against their SHA-256."""
    manifest = read_json(folder / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{folder / MANIFEST} has format {manifest.get('format')!r}; this version reads {FORMAT}")
    for name, digest in manifest.get("files", {}).items():
        if not _plain(name):
            raise CheckpointError(f"{folder / MANIFEST} lists {name!r}, a path outside the checkpoint folder: refused")
        if not (folder / name).exists():
            raise CheckpointError(f"{folder} lacks {name}, which its manifest lists")
        if not _unchanged(folder / name, digest):
            raise CheckpointError(
                f"{folder / name} does not match the SHA-256 in the manifest: it is cut off or was changed"
            )
    return manifest


@functools.lru_cache(maxsize=64)
def _digest(path: Path, size: int, changed: int) -> str:
    return sha256(path)


def _unchanged(path: Path, digest: str) -> bool:
    """Does a file have this SHA-256? Read once per process as long as its size and time of change stay."""
    stat = path.stat()
    return _digest(path, stat.st_size, stat.st_mtime_ns) == digest


def read_weights(path: str | Path, prefer: str = "best") -> dict[str, Tensor]:
    """Weights of a run folder or checkpoint of ours (or of any file of tensors), tied names restored."""
    path = Path(path).expanduser()
    if path.is_file() and not (path.parent / MANIFEST).exists():
        return read_state_dict(path)
    folder = find_checkpoint(path, prefer)
    manifest = read_manifest(folder)
    weights = read_state_dict(folder / WEIGHTS)
    return weights | {name: weights[kept] for name, kept in manifest.get("tied", {}).items() if kept in weights}


def load_model(path: str | Path, prefer: str = "best", **overrides) -> tuple[nn.Module, dict]:
    """(model in eval mode, manifest) of a run folder or checkpoint folder.

    overrides  constructor arguments that replace the recorded ones
    Only classes of ssmzoo.models are built; raises CheckpointError for anything damaged, foreign or misfitting.
    """
    folder = find_checkpoint(path, prefer)
    manifest = read_manifest(folder)
    node = manifest.get("config", {}).get("model")
    if not isinstance(node, dict) or "_target_" not in node:
        raise CheckpointError(f"{folder / MANIFEST} has no config.model to build the model from")
    try:
        model = build_model(node | overrides)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the model of {folder} cannot be built: {error}") from None
    weights = read_state_dict(folder / WEIGHTS)
    weights |= {name: weights[kept] for name, kept in manifest.get("tied", {}).items() if kept in weights}
    fit_state_dict(model, weights, what=f"{manifest.get('model', 'the model')} as its manifest describes it")
    return model.eval(), manifest


class FolderCheckpointIO(CheckpointIO):
    """Lightning's checkpoints in the folder form above. `manifest()` supplies what Lightning does not know.

    error   what kept the last checkpoint from being written, or None. It is not raised: only one of several ranks
            writes, and the others would wait for it for ever.
    """

    def __init__(self, manifest: Callable[[], dict[str, Any]]):
        self.manifest = manifest
        self.error: OSError | None = None
        self.weights_only = False  # leave the trainer's state out of the next ones

    def save_checkpoint(self, checkpoint: dict[str, Any], path, storage_options=None) -> None:
        rest = {k: v for k, v in checkpoint.items() if k != "state_dict"}
        names = {k: k.replace("_orig_mod.", "") for k in checkpoint["state_dict"]}
        weights = {
            new.removeprefix("model."): checkpoint["state_dict"][k]
            for k, new in names.items()
            if new.startswith("model.")
        }
        rest["task_state"] = {
            new: checkpoint["state_dict"][k] for k, new in names.items() if not new.startswith("model.")
        }
        manifest = self.manifest() | {"step": checkpoint["global_step"], "epoch": checkpoint["epoch"]}
        self.error = None
        try:
            write_checkpoint(path, weights, manifest, None if self.weights_only else rest)
        except OSError as error:
            self.error = error

    def load_checkpoint(self, path, map_location=None, weights_only=None) -> dict[str, Any]:
        folder = find_checkpoint(path, prefer="last")
        manifest = read_manifest(folder)
        refuse_zip_bomb(folder / TRAINER)
        try:
            state = torch.load(folder / TRAINER, map_location=map_location or "cpu", weights_only=True)
        except Exception as error:
            raise CheckpointError(f"{folder / TRAINER} was refused: {_first_line(error)}") from None
        weights = read_state_dict(folder / WEIGHTS)
        weights |= {name: weights[kept] for name, kept in manifest.get("tied", {}).items() if kept in weights}
        return state | {"state_dict": {f"model.{k}": v for k, v in weights.items()} | state.pop("task_state", {})}

    def remove_checkpoint(self, path) -> None:
        shutil.rmtree(path, ignore_errors=True)
