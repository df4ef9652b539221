"""Fetching released files: the Hugging Face hub's cache for its repositories, torch.hub's folder for everything else.

Pickles are kept as `<torch.hub.get_dir()>/checkpoints/<name>.safetensors`; `<name>.json` there says where a file came
from, where it lies, and the SHA-256 of what came and of what is kept. A file whose hash differs from the published or
the recorded one is an error. Of the environment HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE, HF_ENDPOINT, HF_TOKEN and
TORCH_HOME are read, at each call.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ssmzoo.released.catalogue import Asset, ByHand, Hub, Weights
from ssmzoo.released.family import find
from ssmzoo.released.files import CheckpointError, read_state_dict, weight_files
from ssmzoo.released.fit import check_fit

TRUE = ("1", "true", "yes", "on")


class DownloadError(CheckpointError):
    """Weights that could not be fetched; the message says why and what to do."""


def fetch(entry: Weights, file: str | Path | None = None) -> Path:
    """The weights of an entry on this machine, under the official names: a safetensors file or a folder of shards.

    file  a copy that a person fetched, which is checked and kept like a download

    Raises DownloadError: unreachable, offline, missing, gated, cut off, or other bytes than those published.
    """
    note = note_of(entry)
    record = read_record(note, entry)
    if file is None and record and (found := present(record)):
        return found
    path = Path(file).expanduser() if file is not None else download(entry)
    if file is not None and not path.exists():
        raise DownloadError(f"no file at {path}")
    digest = sha256(path)
    expected = entry.sha256 or record.get("sha256", digest)
    if digest != expected:
        said = "published" if entry.sha256 else f"recorded at the first download ({note})"
        where = path if file is not None else entry.source
        discard(path, file)
        raise DownloadError(
            f"{entry.name}: {where} has SHA-256 {digest[:16]}..., but {expected[:16]}... was {said}: it is damaged or "
            f"was replaced; try again, and if it stays so do not trust the file"
        )
    kept = path if file is None and is_safetensors(entry) else keep(entry, path, file)
    record = {"source": str(entry.source), "sha256": digest, "path": str(kept), "kept": sha256(kept)}
    note.parent.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(record | {"licence": entry.licence}, indent=1) + "\n", encoding="utf-8")
    return kept


def present(record: dict[str, str]) -> Path | None:
    """The file of a record, if it is there and unchanged."""
    path = Path(record["path"])
    try:
        return path if path.exists() and sha256(path) == record["kept"] else None
    except CheckpointError:  # a folder that lacks shards
        return None


def download(entry: Weights) -> Path:
    """What the source of an entry holds, as it is there."""
    source = entry.source
    if isinstance(source, ByHand):
        raise DownloadError(f"{entry.name} cannot be fetched by a program. {source.todo}: {source.link}")
    if not offline():
        announce(entry)
    return fetch_asset(entry) if isinstance(source, Asset) else fetch_hub(source, entry.name)


def is_safetensors(entry: Weights) -> bool:
    return isinstance(entry.source, Hub) and ".safetensors" in entry.source.file


def keep(entry: Weights, path: Path, file: str | Path | None) -> Path:
    """The published tensors of a downloaded pickle as safetensors; nothing of it is run."""
    from safetensors.torch import save_file

    try:
        state = read_state_dict(path, entry.wrappers)
    except CheckpointError:
        discard(path, file)
        raise
    if file is not None:
        refuse_misfit(entry, state, path)
    state = {key: value.clone().contiguous() for key, value in state.items()}  # tied tensors are stored twice
    kept = weights_folder() / f"{entry.name}.safetensors"
    kept.parent.mkdir(parents=True, exist_ok=True)
    temporary = kept.with_name(f".{kept.name}.{os.getpid()}")
    about = {"format": "pt", "source": str(entry.source), "licence": entry.licence or "not stated"}
    try:
        save_file(state, temporary, metadata=about)
        temporary.replace(kept)
    finally:
        temporary.unlink(missing_ok=True)
    if isinstance(entry.source, Asset):  # the hub's cache is shared with other programs and stays
        discard(path, file)
    return kept


def refuse_misfit(entry: Weights, state: dict[str, torch.Tensor], path: Path) -> None:
    """CheckpointError when a file that a person names is none of the entry's model; nothing of its size is built."""
    from ssmzoo.presets import build_preset

    with torch.device("meta"):
        model = build_preset(entry.preset, **entry.model)
    convert, ours = find(entry.family, "from_official"), None
    try:
        ours = convert(model, dict(state)) if convert else dict(state)
    except (LookupError, RuntimeError, ValueError, StopIteration):  # tensors that the family's key map does not expect
        ours = dict(state)
    check_fit(model, ours, f"{entry.name} ({path} was given for it)", entry.family)


def note_of(entry: Weights) -> Path:
    """The record of an entry's download, there or not."""
    return weights_folder() / f"{entry.name}.json"


def weights_folder() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints"


def read_record(note: Path, entry: Weights) -> dict[str, str]:
    """{"source", "sha256", "path", "kept"} of an earlier download of the same source; {} without one."""
    try:
        record = json.loads(note.read_text(encoding="utf-8"))
        same = record["source"] == str(entry.source) and isinstance(
            record["sha256"] + record["kept"] + record["path"], str
        )
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return record if same else {}


def announce(entry: Weights) -> None:
    """What is about to be fetched and under which licence, on stderr."""
    size = f", {entry.bytes / 2**20:,.0f} MiB" if entry.bytes else ""
    licence = f"licence of the weights: {entry.licence or 'none stated by the publisher'}"
    print(f"{entry.name}: {entry.source}{size}; {licence}", file=sys.stderr, flush=True)


def fetch_hub(source: Hub, what: str) -> Path:
    """A file of the hub, or the folder of a sharded checkpoint when the file is an index."""
    from huggingface_hub import hf_hub_download

    def download(name: str) -> Path:
        with explained(what, f"{endpoint()}/{source.repo}"):
            return Path(
                hf_hub_download(
                    source.repo,
                    name,
                    revision=source.revision,
                    endpoint=endpoint(),
                    cache_dir=hub_cache(),
                    local_files_only=offline(),
                )
            )

    path = download(source.file)
    if not source.file.endswith(".index.json"):
        return path
    for name in shard_names(path):
        download(name)
    return path.parent


def shard_names(index: Path) -> list[str]:
    names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    if any(Path(name).name != name for name in names):
        raise DownloadError(f"{index} names files outside its repository: refused")
    return names


def fetch_asset(entry: Weights) -> Path:
    """A file behind a URL, continued where an earlier try was cut off."""
    from huggingface_hub.file_download import http_get  # resumes, retries, checks the length, draws the bar

    url = entry.source.url
    target = weights_folder() / f"{entry.name}.download"
    if offline():
        raise DownloadError(f"{entry.name} is not on this machine and HF_HUB_OFFLINE is set; {url} is its source")
    target.parent.mkdir(parents=True, exist_ok=True)
    with explained(entry.name, url), open(target, "ab") as file:
        http_get(url, file, resume_size=file.tell(), expected_size=entry.bytes, displayed_filename=entry.name)
    return target


def fetch_tokenizer(repo: str) -> Path:
    """tokenizer.json of a repository."""
    return fetch_hub(Hub(repo, "tokenizer.json"), f"the tokenizer of {repo}")


@contextmanager
def explained(what: str, where: str) -> Iterator[None]:
    """The libraries' errors as one DownloadError, without a line for each of their tries."""
    from huggingface_hub import errors

    log = logging.getLogger("huggingface_hub")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    except errors.GatedRepoError:
        raise DownloadError(
            f"{what}: its publisher asks you to accept a licence first: do so at {where}, then `hf auth login` (or set "
            f"HF_TOKEN)"
        ) from None
    except errors.RevisionNotFoundError:
        raise DownloadError(f"{what}: {where} no longer has the pinned commit") from None
    except errors.RepositoryNotFoundError:
        raise DownloadError(f"{what}: there is no repository {where}, or it is not open to you (HF_TOKEN)") from None
    except errors.LocalEntryNotFoundError as error:
        raise DownloadError(f"{what} is not on this machine and {why_local(error, where)}") from None
    except errors.EntryNotFoundError:
        raise DownloadError(f"{what}: {where} has no such file any more") from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        reason = "has no such file any more" if status == 404 else f"answered with status {status}"
        raise DownloadError(f"{what}: {where} {reason}") from None
    except Exception as error:  # the HTTP client has types of its own
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DownloadError(f"{what} could not be fetched from {where}: {reason}; the same call continues") from None
    finally:
        log.setLevel(before)


def why_local(error: Exception, where: str) -> str:
    if offline():
        return f"HF_HUB_OFFLINE is set; {where} is its source"
    cause = error.__cause__ or error.__context__
    reason = f" ({(str(cause).splitlines() or [''])[0]})" if cause and str(cause) else ""
    return f"{where} cannot be reached{reason}; try again with a network, or set HF_ENDPOINT to a mirror"


def endpoint() -> str:
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def offline() -> bool:
    return any(os.environ.get(name, "").lower() in TRUE for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))


def hub_cache() -> Path:
    """$HF_HUB_CACHE, or hub/ of $HF_HOME, or of the user's cache folder."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()


def discard(path: Path, file: str | Path | None) -> None:
    """Remove a download, from the hub's cache too, so that the next try fetches it anew; a person's own file stays."""
    if file is not None:
        return
    for part in weight_files(path) if path.is_dir() else [path]:
        part.resolve().unlink(missing_ok=True)
        part.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """Of a file, or of a folder's weight files one after the other."""
    digest = hashlib.sha256()
    for file in weight_files(path) if path.is_dir() else [path]:
        with open(file, "rb") as stream:
            for block in iter(lambda: stream.read(1 << 20), b""):
                digest.update(block)
    return digest.hexdigest()
