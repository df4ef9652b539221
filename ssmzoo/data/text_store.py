"""Tokenised corpora on disk: written once in constant memory, then memory-mapped.

    <cache>/text/<key>/   meta.json  tokenizer.json
                          train.tokens  train.starts  train.counts     and the same for val

`tokens` are the ids of all documents one after another (uint8, uint16 or uint32), `starts` (int64) the offset at which
each document begins and, last, their end, `counts` (int64) how often each id occurs. A folder appears under its name
only when it is whole.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ssmzoo.data.text_corpus import FileCorpus
from ssmzoo.data.text_hub import HuggingFaceCorpus
from ssmzoo.data.text_tokenizer import Tokenizer, digest, from_dict

log = logging.getLogger(__name__)

FORMAT = 2  # raise it when what is written changes
_BATCH = 1 << 22  # characters tokenised at a time
_REPORT_EVERY = 15.0  # seconds


class Split(NamedTuple):
    """One side of a corpus. tokens (n) ids, starts (documents + 1) offsets, counts (v), n_bytes of UTF-8."""

    tokens: np.ndarray
    starts: np.ndarray
    counts: np.ndarray
    n_bytes: int


class Store(NamedTuple):
    """An opened corpus: its two sides, its tokenizer, and what is known about it."""

    train: Split
    val: Split
    tokenizer: Tokenizer
    meta: dict


def cache_folder(cache_dir: str | None = None) -> Path:
    """The folder given, or $SSMZOO_CACHE, or ~/.cache/ssmzoo."""
    return Path(cache_dir or os.environ.get("SSMZOO_CACHE") or "~/.cache/ssmzoo").expanduser()


def open_store(folder: Path) -> Store | None:
    """Map a folder into memory; None when there is none, or when its files are not as long as they should be."""
    try:
        meta = json.loads((folder / "meta.json").read_text("utf-8"))
        tokenizer = from_dict(json.loads((folder / "tokenizer.json").read_text("utf-8")))
        return Store(_open_split(folder, "train", meta), _open_split(folder, "val", meta), tokenizer, meta)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError) as error:
        log.warning("the tokenised corpus in %s is damaged (%s) and is written anew", folder, error)
        return None


def build_store(
    folder: Path, corpus: FileCorpus | HuggingFaceCorpus, tokenizer: Tokenizer, val_fraction: float
) -> None:
    """Tokenise a corpus into `folder`, whose parent exists. Two processes may do it at the same time."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.{time.time_ns()}")
    temporary.mkdir()
    try:
        writers = {split: _Writer(temporary, split, tokenizer) for split in ("train", "val")}
        try:
            _tokenise(corpus.documents(val_fraction), tokenizer, writers)
        finally:
            for writer in writers.values():
                writer.close()
        meta = {
            "format": FORMAT,
            "corpus": corpus.name,
            "fingerprint": corpus.fingerprint,
            "tokenizer": tokenizer.name,
            "tokenizer_sha256": digest(tokenizer),
            "vocab_size": tokenizer.vocab_size,
            "end_token": tokenizer.end_token,
            "val_fraction": val_fraction,
            "splits": {split: writer.summary() for split, writer in writers.items()},
        }
        (temporary / "tokenizer.json").write_text(json.dumps(tokenizer.to_dict()), "utf-8")
        (temporary / "meta.json").write_text(json.dumps(meta, indent=1), "utf-8")
        for file in temporary.iterdir():
            _flush(file)
        _put_in_place(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _put_in_place(temporary: Path, folder: Path) -> None:
    if folder.exists() and open_store(folder) is None:  # damaged
        folder.rename(aside := temporary.with_name(temporary.name + ".damaged"))
        shutil.rmtree(aside, ignore_errors=True)
    try:
        temporary.rename(folder)
    except OSError:  # another process was faster
        if open_store(folder) is None:
            raise


def _tokenise(documents, tokenizer: Tokenizer, writers: dict[str, _Writer]) -> None:
    begun = reported = time.monotonic()
    for batch in _batches(documents):
        for (split, text, last, ends), ids in zip(batch, tokenizer.encode_batch([text for _, text, *_ in batch])):
            writers[split].write(ids, len(text.encode("utf-8", "replace")), last, ends)
        if time.monotonic() - reported > _REPORT_EVERY:
            reported = time.monotonic()
            done = sum(writer.n_bytes for writer in writers.values()) / 1e6
            log.info("tokenised %.0f MB, %.1f MB/s", done, done / (reported - begun))


def _batches(documents) -> Iterator[list[tuple[str, str, bool, bool]]]:
    """Lists of (split, piece, is the document's last, and the document ends there) of about _BATCH characters each."""
    batch, size = [], 0
    for document in documents:
        for piece in document.pieces:
            batch.append((document.split, piece, False, False))
            size += len(piece)
            if size >= _BATCH:
                yield batch
                batch, size = [], 0
        batch.append((document.split, "", True, document.ends))
    yield batch


class _Writer:
    """Appends tokens and document starts of one split to its files."""

    def __init__(self, folder: Path, split: str, tokenizer: Tokenizer):
        vocab_size, self.end_token = tokenizer.vocab_size, tokenizer.end_token
        self.dtype = np.uint8 if vocab_size <= 1 << 8 else np.uint16 if vocab_size <= 1 << 16 else np.uint32
        self.tokens, self.starts = open(folder / f"{split}.tokens", "wb"), open(folder / f"{split}.starts", "wb")
        self.counts, self.counts_path = np.zeros(vocab_size, dtype=np.int64), folder / f"{split}.counts"
        self.n_tokens, self.n_bytes, self.n_documents, self.begin = 0, 0, 0, 0

    def write(self, ids: np.ndarray, n_bytes: int, last: bool, ends: bool) -> None:
        if ends and self.end_token is not None and self.n_tokens > self.begin:
            ids = np.append(ids, self.end_token)
        self.tokens.write(ids.astype(self.dtype).tobytes())
        self.counts += np.bincount(ids, minlength=len(self.counts))
        self.n_tokens += len(ids)
        self.n_bytes += n_bytes
        if last and self.n_tokens > self.begin:
            self.starts.write(np.int64(self.begin).tobytes())
            self.n_documents += 1
            self.begin = self.n_tokens

    def close(self) -> None:
        self.starts.write(np.int64(self.n_tokens).tobytes())
        self.tokens.close()
        self.starts.close()
        self.counts.tofile(self.counts_path)

    def summary(self) -> dict:
        return {
            "tokens": self.n_tokens,
            "bytes": self.n_bytes,
            "documents": self.n_documents,
            "dtype": np.dtype(self.dtype).name,
        }


def _open_split(folder: Path, split: str, meta: dict) -> Split:
    about = meta["splits"][split]
    return Split(
        _map(folder / f"{split}.tokens", about["dtype"], about["tokens"]),
        _map(folder / f"{split}.starts", "int64", about["documents"] + 1),
        _map(folder / f"{split}.counts", "int64", meta["vocab_size"]),
        about["bytes"],
    )


def _map(path: Path, dtype: str, length: int) -> np.ndarray:
    if path.stat().st_size != length * np.dtype(dtype).itemsize:
        raise ValueError(f"{path.name} has {path.stat().st_size} bytes")
    return np.memmap(path, dtype=dtype, mode="r") if length else np.zeros(0, dtype=dtype)


def _flush(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
