"""Checkpoints as folders: weights as safetensors, a readable manifest, and the trainer's state.

    <run>/checkpoints/step-000200/model.safetensors   weights only, the model's own names
                                  manifest.json       model name, config, versions, data, metrics, SHA-256 of files
                                  trainer.ckpt        optimiser, loops, loader and random states (weights_only pickle)
    <run>/checkpoints/index.json                      which of them is last, which are best

A checkpoint is written under a temporary name, flushed to disk and renamed to a name that no other has; index.json then
points to it. So at every moment what the index names is whole. Loading runs no code from the files.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import CheckpointIO
from torch import Tensor

from ssmzoo.checkpoint_files import (
    FORMAT,
    INDEX,
    MANIFEST,
    TRAINER,
    WEIGHTS,
    find_checkpoint,
    inside,
    read_index,
    read_manifest,
    sha256,
    stored_weights,
)
from ssmzoo.moved import names
from ssmzoo.released.files import CheckpointError, refuse_zip_bomb

OLD = {"read_json": "ssmzoo.checkpoint_files", "read_weights": "ssmzoo.checkpoint_files", "load_model": "ssmzoo.zoo"}
__getattr__ = names(__name__, OLD)


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
        memory = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
        if tensor.numel() and memory in first:
            tied[name] = first[memory]
        else:
            first[memory] = name
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

    Behind the last step only a validation is missing, which Lightning leaves out when it continues from there: the
    checkpoint before it comes first, if there is one. A damaged one is named and passed over. Raises CheckpointError
    when that leaves none.
    """
    store = Path(run_dir) / "checkpoints"
    index = read_index(store)
    if index is None:
        return None
    others = {*index["recent"], *(b["name"] for b in index["best"])} - {index["last"]}
    problems = []
    last, names = index["last"], sorted(others, reverse=True)
    for name in [*names, last] if last is not None and last == index.get("unvalidated") else [last, *names]:
        if name is None:
            continue
        try:
            folder = inside(store, name)
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
        weights = stored_weights(folder, manifest)
        return state | {"state_dict": {f"model.{k}": v for k, v in weights.items()} | state.pop("task_state", {})}

    def remove_checkpoint(self, path) -> None:
        shutil.rmtree(path, ignore_errors=True)
