"""Where text comes from: files, or the running Python's standard library (`text_hub`: Hugging Face `datasets`).

A corpus hands out documents one after another, each in pieces of about a megabyte, so that nothing depends on how large
it is; it decides which documents are held out, and knows a fingerprint of its content.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import platform
import sysconfig
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from ssmzoo.data.text_files import RECORDS, Scan, is_records, open_content, read_pieces, read_records, scan

FEW_RECORDS = 10_000  # below it, what is held out is checked against the share wanted
REMEMBER_SCANS_ABOVE = 1 << 30  # bytes; smaller corpora are hashed anew at every start
_NOT_STDLIB = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_OF_THE_MACHINE = ("_sysconfigdata", "config-", "sitecustomize", "usercustomize")


class Document(NamedTuple):
    """A stretch of text; the state of a model is reset between two of them. `pieces` yields it in order."""

    split: str  # "train" or "val"
    pieces: Iterator[str]
    ends: bool = True  # False: the first part of a document that was cut in two


class Source(NamedTuple):
    """Bytes [start, stop) of a file's text, or all records of one."""

    name: str
    path: str
    start: int
    stop: int
    split: str  # "train", "val" or "records"
    ends: bool = True  # at its document's end


class FileCorpus:
    """Text files: one file, all files below a folder (names that start with a dot are left out), or a glob.

    path None stands for the `.py` files of the running Python's standard library, without tests and installed
    packages. Files are read as UTF-8 in the order of their names, by suffix (see `text_files`): a document per file,
    or per record, whose text is in `text_field` (None: "text"). Of identical files the first counts.

    Held out are the files whose SHA-256, read as a fraction of its range, lies below `val_fraction`: a file does not
    change sides when others come or go. If that gives less than a fifth or more than three times the share wanted, as
    with few files, files are taken in the order of their hashes as far as the share allows, and if each of them is too
    large, the tail of the largest. Records are held out by the same rule, one at a time.

    Raises ValueError for a path that does not exist, no text at all, and a file that is not text (naming it).
    """

    def __init__(self, path: str | None = None, text_field: str | None = None):
        self.path, self.text_field = path, text_field
        self.name = f"Python {platform.python_version()} standard library" if path is None else str(path)
        self.fingerprint: str | None = None  # SHA-256 over names and contents, after `scan`
        self._sources: list[Source] = []

    def identity(self, cache_dir: Path, val_fraction: float) -> str:
        """Read and check every file; afterwards `documents` and `fingerprint` are known."""
        files = _stdlib_files() if self.path is None else _files(self.path)
        scans = _scans(files, cache_dir)
        lines = "".join(f"{name}\0{scans[path].digest}\n" for name, path in files)
        records = [(name, path) for name, path in files if is_records(path)]
        if records:
            lines += f"text_field\0{self._field}\n"
        elif self.text_field is not None:
            raise ValueError(
                f"data.text_field = '{self.text_field}' does nothing: '{self.name}' holds no file of records "
                f"({', '.join(RECORDS)})"
            )
        self.fingerprint = hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest()
        plain = [file for file in files if not is_records(file[1])]
        sources = _hold_out(plain, scans, val_fraction) + [Source(*file, 0, 0, "records") for file in records]
        self._sources = sorted(sources, key=lambda source: source[:3])
        if not self._sources:
            raise ValueError(f"data.path = '{self.path}' holds {len(files)} file(s) but no text; give files with text")
        return self.fingerprint

    def documents(self, val_fraction: float) -> Iterator[Document]:
        """Call `identity` with the same val_fraction first."""
        held_out = _held_out_records(self._records(), val_fraction)
        for source in self._sources:
            if source.split != "records":
                yield Document(source.split, read_pieces(source.path, source.start, source.stop), source.ends)
                continue
            for text in read_records(source.path, self._field):
                yield Document("val" if held_out(_sha(text)) else "train", iter([text]))

    @property
    def _field(self) -> str:
        return self.text_field or "text"

    def _records(self) -> Iterator[str]:
        for source in self._sources:
            if source.split == "records":
                yield from read_records(source.path, self._field)


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _held_out_records(texts: Iterator[str], val_fraction: float) -> Callable[[str], bool]:
    """Which records, by the SHA-256 of their text, are held out; see FileCorpus for the rule. With many records the
    hashes alone give the share."""
    size = {_sha(text): len(text) for text in islice(texts, FEW_RECORDS)}
    wanted = val_fraction * sum(size.values())
    share = sum(n for digest, n in size.items() if fraction(digest) < val_fraction)
    if len(size) >= FEW_RECORDS or wanted / 5 <= share <= wanted * 3:
        return lambda digest: fraction(digest) < val_fraction
    chosen, room = set(), wanted
    for digest in sorted(size):
        if size[digest] <= room:
            chosen.add(digest)
            room -= size[digest]
    if not chosen and len(size) > 1:
        chosen = {min(size)}
    return chosen.__contains__


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


def _scans(files: list[tuple[str, str]], cache_dir: Path) -> dict[str, Scan]:
    """SHA-256 and size of every file by path. For large corpora remembered by (path, size, time of change)."""
    stats = [(os.path.abspath(path), os.stat(path).st_size, os.stat(path).st_mtime_ns) for _, path in files]
    remember = sum(size for _, size, _ in stats) > REMEMBER_SCANS_ABOVE
    memory = cache_dir / "scans-v2" / f"{hashlib.sha256(json.dumps(stats).encode()).hexdigest()[:32]}.json"
    if remember and memory.is_file():
        return dict(zip((path for _, path in files), (Scan(*found) for found in json.loads(memory.read_text()))))
    scans = {path: scan(path) for _, path in files}
    if remember:
        memory.parent.mkdir(parents=True, exist_ok=True)
        temporary = memory.with_suffix(f".tmp{os.getpid()}")
        temporary.write_text(json.dumps(list(scans.values())))
        os.replace(temporary, memory)
    return scans


def fraction(digest: str) -> float:
    """A SHA-256 as a number in [0, 1)."""
    return int(digest[:12], 16) / 16**12


def _hold_out(files: list[tuple[str, str]], scans: dict[str, Scan], val_fraction: float) -> list[Source]:
    """Decide for every file, identical and empty ones left out; see FileCorpus for the rule."""
    unique = {scans[path].digest: (name, path) for name, path in reversed(files) if scans[path].size}
    size = {digest: scans[path].size for digest, (_, path) in unique.items()}
    wanted = val_fraction * sum(size.values())
    held_out = {digest for digest in unique if fraction(digest) < val_fraction}
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
            sources += [Source(name, path, 0, cut, "train", ends=False), Source(name, path, cut, size[digest], "val")]
        else:
            sources.append(Source(name, path, 0, size[digest], "val" if digest in held_out else "train"))
    return [source for source in sources if source.start < source.stop]


def _line_start(path: str, offset: int, stop: int) -> int:
    """The first start of a line at or after `offset`, if one comes soon and before the end; else of a character."""
    with open_content(path) as file:
        file.seek(offset)
        ahead = file.read(min(1 << 16, (stop - offset) // 2))
    if (newline := ahead.find(b"\n")) >= 0:
        return offset + newline + 1
    return offset + next((i for i, byte in enumerate(ahead) if byte & 0xC0 != 0x80), 0)
