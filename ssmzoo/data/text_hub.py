"""Text of a Hugging Face dataset, downloaded or streamed."""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from ssmzoo.data.text_corpus import Document, fraction


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
                held_out = split == self.val_split if self.val_split else fraction(digest.hexdigest()) < val_fraction
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
