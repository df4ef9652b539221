"""Text out of files by their suffix: plain UTF-8, one record per line or row, and either compressed.

    .jsonl .ndjson     an object per line;  .csv .tsv  a row per document under a header;  .parquet .pq  by pyarrow
    .gz .bz2 .xz .lzma .zst   behind any of them but parquet;  everything else: one document of plain text

Files are read in pieces, a record at a time, so that nothing depends on their size. A byte-order mark is no text.
"""

from __future__ import annotations

import bz2
import codecs
import contextlib
import csv
import gzip
import hashlib
import io
import json
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

PIECE = 1 << 20  # bytes read at a time
LONGEST_CELL = 1 << 30  # characters of a cell in a .csv file
REMEMBER = "give only text, for instance by a glob such as data.path='folder/**/*.txt'"


class Scan(NamedTuple):
    """SHA-256 and length in bytes of a file's content: decompressed text, or a file of records as it is stored."""

    digest: str
    size: int


def _open_zst(path: str, mode: str) -> BinaryIO:
    try:
        from compression import zstd  # Python 3.14
    except ImportError:
        try:
            import zstandard as zstd
        except ImportError:
            raise ValueError(f"'{path}' needs the package zstandard: pip install zstandard, or unpack it") from None
    return zstd.open(path, mode)


COMPRESSIONS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".lzma": lzma.open, ".zst": _open_zst}


def _suffixes(path: str) -> tuple[str, str]:
    """(suffix of the kind, suffix of the compression or "")"""
    suffix = Path(path).suffix.lower()
    return (Path(Path(path).stem).suffix.lower(), suffix) if suffix in COMPRESSIONS else (suffix, "")


def is_records(path: str) -> bool:
    """Whether a file holds a document per line or row."""
    return _suffixes(path)[0] in RECORDS


@contextlib.contextmanager
def open_content(path: str) -> Iterator[BinaryIO]:
    """A file's content as bytes, decompressed by its suffix. ValueError for what cannot be opened or unpacked."""
    opener = COMPRESSIONS.get(_suffixes(path)[1], open)
    try:
        with opener(path, "rb") as file:
            yield file
    except ValueError:
        raise
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"data.path: '{path}' cannot be read: {reason}; {REMEMBER}") from error
    except Exception as error:
        if type(error).__name__ != "ZstdError":  # of whichever package unpacks .zst
            raise
        raise ValueError(f"data.path: '{path}' cannot be unpacked: {error}") from error


def scan(path: str) -> Scan:
    """Read a file to its end; ValueError unless it is UTF-8 text without NUL, or a file of records, checked later."""
    if is_records(path):
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return Scan(digest, file.tell())
    digest, decoder, seen = hashlib.sha256(), codecs.getincrementaldecoder("utf-8")(), 0
    try:
        with open_content(path) as file:
            while data := file.read(PIECE):
                if (nul := data.find(b"\0")) >= 0:
                    raise ValueError(f"data.path: '{path}' is not text: NUL at byte {seen + nul}; {REMEMBER}")
                decoder.decode(data)
                digest.update(data)
                seen += len(data)
            decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"data.path: '{path}' is not UTF-8 text: {error.reason} near byte {seen + error.start}; "
            f"convert it to UTF-8, or {REMEMBER}"
        ) from error
    return Scan(digest.hexdigest(), seen)


def read_pieces(path: str, start: int, stop: int) -> Iterator[str]:
    """The text of bytes [start, stop) in pieces of about a megabyte that end at a line's end, or else after a space."""
    decoder = codecs.getincrementaldecoder("utf-8-sig" if start == 0 else "utf-8")()
    rest = ""
    with open_content(path) as file:
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


def read_records(path: str, field: str) -> Iterator[str]:
    """The texts of a file of records that are not empty. ValueError names line, field and what there is instead."""
    kind, packed = _suffixes(path)
    for line, value in RECORDS[kind](path, field, packed):
        if value is not None and not isinstance(value, str):
            raise ValueError(f"line {line} of '{path}': field '{field}' holds {type(value).__name__}, not text")
        if value:
            yield value.encode("utf-8", "replace").decode("utf-8")  # without halves of surrogate pairs


def _json_lines(path: str, field: str, packed: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(_lines(path, "\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            message = f"line {number} of '{path}' is not JSON ({error}); a .jsonl file has an object per line"
            raise ValueError(message) from None
        if not isinstance(row, dict):
            raise ValueError(f"line {number} of '{path}' is a JSON {type(row).__name__}; expected an object per line")
        if field not in row:
            raise _no_field(f"line {number} of '{path}'", field, row)
        yield number, row[field]


def _rows(path: str, field: str, packed: str) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(LONGEST_CELL)
    reader = csv.DictReader(_lines(path, ""), delimiter="\t" if _suffixes(path)[0] == ".tsv" else ",", strict=True)
    try:
        if field not in (reader.fieldnames or ()):
            raise _no_field(f"the header of '{path}'", field, reader.fieldnames or ())
        for row in reader:
            yield reader.line_num, row[field]
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num} of '{path}' is not {_suffixes(path)[0][1:]}: {error}") from None


def _parquet(path: str, field: str, packed: str) -> Iterator[tuple[int, Any]]:
    if packed:
        raise ValueError(f"'{path}': a parquet file is compressed inside; unpack it")
    try:
        from pyarrow import parquet
    except ImportError:
        raise ValueError(f"'{path}' needs pyarrow: pip install pyarrow, or convert it to .jsonl") from None
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if field not in names:
                raise _no_field(f"'{path}'", field, names)
            row = 0
            for batch in file.iter_batches(batch_size=1024, columns=[field]):
                for value in batch.column(0).to_pylist():
                    row += 1
                    yield row, value
    except OSError as error:  # pyarrow's errors are ValueErrors or OSErrors
        raise ValueError(f"data.path: '{path}' cannot be read as parquet: {error}") from error


RECORDS = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".csv": _rows,
    ".tsv": _rows,
    ".parquet": _parquet,
    ".pq": _parquet,
}


def _lines(path: str, newline: str) -> Iterator[str]:
    with open_content(path) as file:
        try:
            yield from io.TextIOWrapper(file, "utf-8-sig", newline=newline)
        except UnicodeDecodeError as error:
            raise ValueError(f"data.path: '{path}' is not UTF-8 text: {error.reason}; convert it to UTF-8") from None


def _no_field(where: str, field: str, known) -> ValueError:
    return ValueError(f"{where} has no field '{field}'; it has {', '.join(map(str, known))}: set data.text_field")
