"""Where text comes from: files, the running Python's standard library, or Hugging Face `datasets`.

A corpus hands out documents one after another, each in pieces of about a megabyte, so that nothing depends on how large
it is; it decides which documents are held out, and knows a fingerprint of its content.
"""

from __future__ import annotations

import codecs
import glob
import hashlib
import json
import os
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PIECE = 1 << 20  # bytes read at a time
REMEMBER_SCANS_ABOVE = 1 << 30  # bytes; smaller corpora are hashed anew at every start
_NOT_STDLIB = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_OF_THE_MACHINE = ("_sysconfigdata", "config-", "sitecustomize", "usercustomize")


class Document(NamedTuple):
    """A stretch of text; the state of a model is reset between two of them. `pieces` yields it in order."""

    split: str  # "train" or "val"
    pieces: Iterator[str]


class Source(NamedTuple):
    """Bytes [start, stop) of a file."""

    name: str
    path: str
    start: int
    stop: int
    split: str


class FileCorpus:
    """Text files: one file, all files below a folder (names that start with a dot are left out), or a glob.

    path None stands for the `.py` files of the running Python's standard library, without tests and installed
    packages. Files are read as UTF-8 in the order of their names; of identical files the first counts.

    Held out are the files whose SHA-256, read as a fraction of its range, lies below `val_fraction`: a file does not
    change sides when others come or go. If that gives less than a fifth or more than three times the share wanted, as
    with few files, files are taken in the order of their hashes as far as the share allows, and if each of them is too
    large, the tail of the largest.

    Raises ValueError for a path that does not exist, no text at all, and a file that is not text (naming it).
    """

    def __init__(self, path: str | None = None):
        self.path = path
        self.name = f"Python {platform.python_version()} standard library" if path is None else str(path)
        self.fingerprint: str | None = None  # SHA-256 over names and contents, after `scan`
        self._sources: list[Source] = []

    def identity(self, cache_dir: Path, val_fraction: float) -> str:
        """Read and check every file; afterwards `documents` and `fingerprint` are known."""
        files = _stdlib_files() if self.path is None else _files(self.path)
        digests = _digests(files, cache_dir)
        lines = "".join(f"{name}\0{digests[path]}\n" for name, path in files)
        self.fingerprint = hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest()
        self._sources = _hold_out(files, digests, val_fraction)
        if not self._sources:
            raise ValueError(f"data.path = '{self.path}' holds {len(files)} file(s) but no text; give files with text")
        return self.fingerprint

    def documents(self, val_fraction: float) -> Iterator[Document]:
        """Call `identity` with the same val_fraction first."""
        for source in self._sources:
            yield Document(source.split, read_pieces(source.path, source.start, source.stop))


class HuggingFaceCorpus:
    """A dataset of the Hugging Face hub, or anything else that `datasets.load_dataset(name, ...)` reads.

    name, subset, split, data_files, revision  as in `load_dataset` (name="json" with data_files reads local files)
    text_column    column that holds the text; every row is a document
    streaming      read over the network while tokenising instead of downloading everything first
    val_split      split to hold out, such as "validation"; None: rows by the SHA-256 of their text
    max_documents  stop after so many rows of a split

    The tokenised copy is found again by these arguments alone, without network: give a `revision` to pin the content.
    """

    def __init__(
        self,
        name: str,
        subset: str | None = None,
        split: str = "train",
        val_split: str | None = None,
        text_column: str = "text",
        streaming: bool = False,
        data_files: str | list[str] | None = None,
        revision: str | None = None,
        max_documents: int | None = None,
    ):
        if max_documents is not None and max_documents < 1:
            raise ValueError(f"data.corpus.max_documents = {max_documents}; give at least 1, or null for all rows")
        self.name, self.subset, self.split, self.val_split = name, subset, split, val_split
        self.text_column, self.streaming, self.revision = text_column, streaming, revision
        self.data_files = [data_files] if isinstance(data_files, str) else data_files and list(data_files)
        self.max_documents = max_documents
        self.fingerprint: str | None = None  # SHA-256 over the texts, after `documents` has run to its end

    def identity(self, cache_dir: Path, val_fraction: float) -> str:
        files = [f for pattern in self.data_files or () for f in sorted(glob.glob(os.path.expanduser(pattern)))]
        local = [(f, os.stat(f).st_size, os.stat(f).st_mtime_ns) for f in files]
        what = [
            self.name,
            self.subset,
            self.split,
            self.val_split,
            self.text_column,
            self.revision,
            self.max_documents,
            self.data_files,
            local,
        ]
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()

    def documents(self, val_fraction: float) -> Iterator[Document]:
        everything = hashlib.sha256()
        for split in [self.split] + ([self.val_split] if self.val_split else []):
            for text in self._texts(split):
                digest = hashlib.sha256(text.encode("utf-8", "replace"))
                everything.update(digest.digest())
                held_out = split == self.val_split if self.val_split else _fraction(digest.hexdigest()) < val_fraction
                yield Document("val" if held_out else "train", iter([text]))
        self.fingerprint = everything.hexdigest()

    def _texts(self, split: str) -> Iterator[str]:
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise ValueError("data=hf_text needs the package `datasets`: pip install datasets") from error
        try:
            rows = load_dataset(
                self.name,
                self.subset,
                split=split,
                data_files=self.data_files,
                revision=self.revision,
                streaming=self.streaming,
            )
        except Exception as error:  # network, hub, unknown name, unknown split: dozens of classes
            raise ValueError(
                f"data.corpus: Hugging Face datasets could not load '{self.name}' (subset {self.subset}, "
                f"split {split}): {type(error).__name__}: {(str(error).splitlines() or [''])[0]}; check "
                f"name, split and network, or use data.path=<file, folder or glob>"
            ) from error
        for i, row in enumerate(rows):
            if i == self.max_documents:
                return
            if self.text_column not in row:
                raise ValueError(
                    f"data.corpus.text_column = '{self.text_column}' is no column of '{self.name}'; "
                    f"it has {', '.join(row)}"
                )
            text = row[self.text_column]
            if text is not None and not isinstance(text, str):
                raise ValueError(
                    f"data.corpus.text_column = '{self.text_column}' of '{self.name}' holds "
                    f"{type(text).__name__}, not text; choose another of {', '.join(row)}"
                )
            if text:
                yield text


def read_pieces(path: str, start: int, stop: int) -> Iterator[str]:
    """The text of bytes [start, stop) in pieces of about a megabyte that end at a line's end, or else after a space."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    rest = ""
    with open(path, "rb") as file:
        file.seek(start)
        while start < stop and (data := file.read(min(PIECE, stop - start))):
            start += len(data)
            text = rest + decoder.decode(data)
            cut = (text.rfind("\n") + 1 or text.rfind(" ") + 1 or len(text)) if start < stop else len(text)
            if cut:
                yield text[:cut]
            rest = text[cut:]
    if start < stop:
        raise ValueError(f"'{path}' became shorter while it was read; start again when nobody writes to it")


def _stdlib_files() -> list[tuple[str, str]]:
    root = sysconfig.get_paths()["stdlib"]
    files = [
        (name, path)
        for name, path in _walk(root, _NOT_STDLIB)
        if name.endswith(".py") and not name.startswith(_OF_THE_MACHINE)
    ]
    if not files:
        raise ValueError(f"this Python keeps no sources of its standard library in {root}; give data.path=<text files>")
    return files


def _files(path: str) -> list[tuple[str, str]]:
    """(name, path) of every file meant by a path or glob, in the order of the names."""
    path = os.path.expanduser(str(path))
    if os.path.isfile(path):
        return [(os.path.basename(path), path)]
    if os.path.isdir(path):
        if files := _walk(path, {"__pycache__"}):
            return files
        raise ValueError(f"data.path = '{path}' is a folder without files; give a folder, file or glob with text")
    if files := sorted(f for f in glob.glob(path, recursive=True) if os.path.isfile(f)):
        root = os.path.commonpath([os.path.dirname(os.path.abspath(f)) for f in files])
        return [(os.path.relpath(os.path.abspath(f), root).replace(os.sep, "/"), f) for f in files]
    kind = "matches no file" if glob.has_magic(path) else "does not exist"
    raise ValueError(
        f"data.path = '{path}' {kind} (looked from {os.getcwd()}); give a text file, a folder, or a "
        f"quoted glob such as 'books/**/*.txt'"
    )


def _walk(root: str, without: set[str]) -> list[tuple[str, str]]:
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [f for f in folders if f not in without and not f.startswith(".")]
        paths = [os.path.join(folder, name) for name in names if not name.startswith(".")]
        found += [(os.path.relpath(p, root).replace(os.sep, "/"), p) for p in paths if os.path.isfile(p)]
    return sorted(found)


def _digests(files: list[tuple[str, str]], cache_dir: Path) -> dict[str, str]:
    """SHA-256 of every file by path. For large corpora remembered by (path, size, time of change)."""
    stats = [(os.path.abspath(path), os.stat(path).st_size, os.stat(path).st_mtime_ns) for _, path in files]
    remember = sum(size for _, size, _ in stats) > REMEMBER_SCANS_ABOVE
    memory = cache_dir / "scans" / f"{hashlib.sha256(json.dumps(stats).encode()).hexdigest()[:32]}.json"
    if remember and memory.is_file():
        return dict(zip((path for _, path in files), json.loads(memory.read_text())))
    digests = {path: _digest(path) for _, path in files}
    if remember:
        memory.parent.mkdir(parents=True, exist_ok=True)
        temporary = memory.with_suffix(f".tmp{os.getpid()}")
        temporary.write_text(json.dumps(list(digests.values())))
        os.replace(temporary, memory)
    return digests


def _digest(path: str) -> str:
    """SHA-256 of a file; ValueError unless it is UTF-8 text without NUL."""
    remedy = "give only text, for instance by a glob such as data.path='folder/**/*.txt'"
    digest, decoder, seen = hashlib.sha256(), codecs.getincrementaldecoder("utf-8")(), 0
    try:
        with open(path, "rb") as file:
            while data := file.read(PIECE):
                if (nul := data.find(b"\0")) >= 0:
                    raise ValueError(f"data.path: '{path}' is not text: NUL at byte {seen + nul}; {remedy}")
                decoder.decode(data)
                digest.update(data)
                seen += len(data)
            decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"data.path: '{path}' is not UTF-8 text: {error.reason} near byte {seen + error.start}; "
            f"convert it to UTF-8, or {remedy}"
        ) from error
    except OSError as error:
        raise ValueError(f"data.path: '{path}' cannot be read: {error.strerror}; {remedy}") from error
    return digest.hexdigest()


def _fraction(digest: str) -> float:
    """A SHA-256 as a number in [0, 1)."""
    return int(digest[:12], 16) / 16**12


def _hold_out(files: list[tuple[str, str]], digests: dict[str, str], val_fraction: float) -> list[Source]:
    """Decide for every file, identical and empty ones left out; see FileCorpus for the rule."""
    unique = {digests[path]: (name, path) for name, path in reversed(files) if os.path.getsize(path)}
    size = {digest: os.path.getsize(path) for digest, (_, path) in unique.items()}
    wanted = val_fraction * sum(size.values())
    held_out = {digest for digest in unique if _fraction(digest) < val_fraction}
    if not wanted / 5 <= sum(size[d] for d in held_out) <= wanted * 3:
        held_out, room = set(), wanted
        for digest in sorted(unique):
            if size[digest] <= room:
                held_out.add(digest)
                room -= size[digest]
    sources = []
    largest = max(sorted(size), key=size.__getitem__, default=None)
    for digest, (name, path) in sorted(unique.items(), key=lambda item: item[1]):
        if not held_out and digest == largest:
            cut = _line_start(path, int(size[digest] * (1 - val_fraction)), size[digest])
            sources += [Source(name, path, 0, cut, "train"), Source(name, path, cut, size[digest], "val")]
        else:
            sources.append(Source(name, path, 0, size[digest], "val" if digest in held_out else "train"))
    return [source for source in sources if source.start < source.stop]


def _line_start(path: str, place: int, stop: int) -> int:
    """The first start of a line at or after `place`, if one comes soon and before the end; else of a character."""
    with open(path, "rb") as file:
        file.seek(place)
        ahead = file.read(min(1 << 16, (stop - place) // 2))
    if (newline := ahead.find(b"\n")) >= 0:
        return place + newline + 1
    return place + next((i for i, byte in enumerate(ahead) if byte & 0xC0 != 0x80), 0)
