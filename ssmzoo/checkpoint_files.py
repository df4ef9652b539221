"""Reading checkpoints of ours: what writes them stands in ssmzoo/train/checkpoint.py.

    <run>/checkpoints/step-000200/model.safetensors   weights only, the model's own names
                                  manifest.json       model name, config, versions, data, metrics, SHA-256 of files
    <run>/checkpoints/index.json                      which of them is last, which are best

Loading runs no code from the files.
"""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path

from torch import Tensor

from ssmzoo.adapt.lora import merged
from ssmzoo.released.files import CheckpointError, read_state_dict

WEIGHTS, MANIFEST, INDEX, TRAINER = "model.safetensors", "manifest.json", "index.json", "trainer.ckpt"
FORMAT = 1
LARGEST_JSON = 64 << 20  # bytes; a manifest holds a configuration and perhaps a tokenizer


def find_checkpoint(path: str | Path, prefer: str = "best") -> Path:
    """The checkpoint folder meant by a run folder, a checkpoint folder or a file inside one.

    prefer  "best" or "last", for run folders. Raises CheckpointError.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise CheckpointError(f"no checkpoint or run folder at {path}")
    given = path
    if path.is_file():
        path = path.parent
    if (path / MANIFEST).exists():
        return path
    store = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    index = read_index(store)
    if index is None:
        if given.is_file():
            raise CheckpointError(f"{given} stands in no checkpoint of a run; `ssmzoo info FILE` says what a file is")
        raise CheckpointError(
            f"{path} is neither a run folder (with checkpoints/{INDEX}) nor a checkpoint ({MANIFEST})"
        )
    name = index["best"][0]["name"] if prefer == "best" and index["best"] else index["last"]
    return inside(store, name)


def read_index(store: Path) -> dict | None:
    """{"last": name, "recent": [names], "best": [{"name", "value"}]} of a folder of checkpoints; None: it has none.

    An index that is cut off, empty or gone is put together from the checkpoints that are whole. Raises CheckpointError
    when there was one and none of them is.
    """
    file, problem = Path(store) / INDEX, f"{Path(store) / INDEX} is missing"
    if file.exists():
        try:
            return _checked(read_json(file), file)
        except CheckpointError as error:
            problem = str(error)
    found = sorted((f for f in Path(store).glob("step-*") if (f / MANIFEST).exists()), key=lambda f: f.stat().st_mtime)
    manifests = {}
    for folder in found:
        try:
            manifests[folder.name] = read_manifest(folder)
        except CheckpointError:  # half written, or damaged as well
            continue
    if not manifests and not file.exists():
        return None
    if not manifests:
        raise CheckpointError(f"{problem}, and no checkpoint beside it is whole")
    print(f"warning: {problem}; taken together from the {len(manifests)} whole checkpoint(s) beside it", flush=True)
    whole = [name for name, manifest in manifests.items() if TRAINER in manifest.get("files", {})]
    aim = next((m["monitor"] for m in manifests.values() if isinstance(m.get("monitor"), dict)), {})
    monitor, mode = str(aim.get("name", "val/loss")), str(aim.get("mode", "min"))
    values = {name: manifest.get("metrics", {}).get(monitor) for name, manifest in manifests.items()}
    best = [{"name": n, "value": float(v)} for n, v in values.items() if isinstance(v, (int, float)) and v == v]
    best.sort(key=lambda entry: entry["value"], reverse=mode == "max")
    return {"last": whole[-1] if whole else None, "recent": whole, "best": best[:1], "monitor": monitor, "mode": mode}


def _checked(index: dict, file: Path) -> dict:
    """An index with the entries that every reader counts on."""
    index = {"last": None, "recent": [], "best": []} | index
    best = index["best"]
    if not (
        isinstance(index["recent"], list)
        and all(isinstance(name, str) for name in (*index["recent"], index["last"] or ""))
        and isinstance(best, list)
        and all(isinstance(b, dict) and isinstance(b.get("name"), str) and "value" in b for b in best)
    ):
        raise CheckpointError(f"{file} does not list checkpoints")
    return index


def read_weights(path: str | Path, prefer: str = "best") -> dict[str, Tensor]:
    """Weights of a run folder or checkpoint of ours (or of any file of tensors), tied names restored."""
    path = Path(path).expanduser()
    if path.is_file() and not (path.parent / MANIFEST).exists():
        return read_state_dict(path)
    if path.is_dir() and not any((path / name).exists() for name in (MANIFEST, INDEX, "checkpoints", "config.yaml")):
        return read_state_dict(path)  # a released checkpoint's folder
    folder = find_checkpoint(path, prefer)
    return weights_of(folder, read_manifest(folder))


def weights_of(folder: Path, manifest: dict) -> dict[str, Tensor]:
    """The tensors of a checkpoint folder under all the names of its model; LoRA is merged."""
    return merged(stored_weights(folder, manifest))


def stored_weights(folder: Path, manifest: dict) -> dict[str, Tensor]:
    """The tensors as they were trained, LoRA apart."""
    weights = read_state_dict(folder / WEIGHTS)
    return weights | {name: weights[kept] for name, kept in manifest.get("tied", {}).items() if kept in weights}


def read_manifest(folder: Path) -> dict:
    """The manifest of a checkpoint folder, with the files it lists checked against their SHA-256."""
    manifest = read_json(folder / MANIFEST)
    if manifest.get("format") != FORMAT:
        newer = isinstance(there := manifest.get("format"), int) and there > FORMAT
        more = ": a newer ssmzoo wrote it, update this one" if newer else ""
        raise CheckpointError(f"{folder / MANIFEST} has format {there!r}; this version reads {FORMAT}{more}")
    for name, digest in manifest.get("files", {}).items():
        if not plain(name):
            raise CheckpointError(f"{folder / MANIFEST} lists {name!r}, a path outside the checkpoint folder: refused")
        if not (folder / name).exists():
            raise CheckpointError(f"{folder} lacks {name}, which its manifest lists")
        if not _unchanged(folder / name, digest):
            raise CheckpointError(
                f"{folder / name} does not match the SHA-256 in the manifest: it is cut off or was changed"
            )
    return manifest


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


def inside(store: Path, name) -> Path:
    """The checkpoint that an index names, which must lie beside the index."""
    if not plain(name) or not (store / name / MANIFEST).exists():
        raise CheckpointError(f"{store / INDEX} names the checkpoint {name!r}, which is not a folder beside it")
    return store / name


def plain(name) -> bool:
    """Is this the name of a file or folder, and no path to elsewhere?"""
    return isinstance(name, str) and Path(name).name == name and name not in ("", ".", "..")


def _unchanged(path: Path, digest: str) -> bool:
    """Does a file have this SHA-256? Read once per process as long as its size and time of change stay."""
    stat = path.stat()
    return _digest(path, stat.st_size, stat.st_mtime_ns) == digest


@functools.lru_cache(maxsize=64)
def _digest(path: Path, size: int, changed: int) -> str:
    return sha256(path)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(file)


def _sha256(file) -> str:  # Python 3.10
    digest = hashlib.sha256()
    for block in iter(lambda: file.read(1 << 20), b""):
        digest.update(block)
    return digest.hexdigest()
