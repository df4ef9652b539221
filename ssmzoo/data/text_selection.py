"""Which part of a corpus to train on: the pieces most like a target text.

    cut      every training document into pieces of `length` characters, all about as long as each other
    score    each piece against the target
    keep     the best `share` of them; neighbours that stay are one document

    dsir     importance resampling (Xie et al. 2023, arXiv 2302.03169): hashed unigrams and bigrams c (buckets) of
             a piece under the target's and the corpus's bag of n-grams, log w = sum of c (log p - log q), plus Gumbel
             noise
    zip      alignment by compression (Obbad et al. 2024, arXiv 2410.18194): 1 - the mean of the normalised compression
             distances NCD(x, t) = (C(x + t) - min(C(x), C(t))) / max(C(x), C(t)) to pieces t of the target
    random   a draw: what the others are compared with

The held-out documents stay as they are. Done once: the result is tokenised and kept like any corpus.
"""

from __future__ import annotations

import hashlib
import inspect
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ssmzoo.data.text_corpus import Document, FileCorpus
from ssmzoo.data.text_hub import HuggingFaceCorpus
from ssmzoo.suggest import check_slot, nearest

BUCKETS = 10_000
LEAST_WORDS = 100  # a piece with fewer says too little: dsir drops it, as its authors do
EXAMPLES = 32  # pieces of the target that zip compresses with every piece of the corpus
WORD = re.compile(r"\w+|[^\w\s]+")


class SelectedCorpus:
    """A corpus whose training documents are the pieces of `corpus` most like `target`.

    corpus   where the pieces come from (`text_corpus`, `text_hub`)
    target   text file, folder or glob, as data.path; None goes with method "random" alone
    method   dsir, zip or random, as above
    share    of the pieces that stay, in (0, 1)
    length   characters of a piece; gzip sees 32 KiB at once: at most 16,000
    seed     of the noise and the draw

    Raises ValueError for values out of these ranges, and where too little text is left.
    """

    def __init__(
        self,
        corpus: FileCorpus | HuggingFaceCorpus,
        target: str | None = None,
        method: str = "dsir",
        share: float = 0.25,
        length: int = 2000,
        seed: int = 0,
    ):
        if method not in METHODS:
            raise ValueError(
                f"data.selection.method = '{method}'; choose from {', '.join(METHODS)}{nearest(method, METHODS)}"
            )
        if not 0 < share < 1:
            raise ValueError(
                f"data.selection.share = {share} must lie between 0 and 1: the share of the text that stays"
            )
        if not 200 <= length <= 16_000:
            raise ValueError(f"data.selection.length = {length}; give 200 to 16,000 characters for a piece")
        if (target is None) != (method == "random"):
            given = "is missing; name text that the chosen pieces should be like" if target is None else "does nothing"
            raise ValueError(f"data.selection.target {given} (data.selection.method = '{method}')")
        self.corpus, self.method, self.share, self.length, self.seed = corpus, method, share, length, seed
        self.target = None if target is None else FileCorpus(target)
        self.name = f"{corpus.name}, {100 * share:g} % by {method}" + ("" if target is None else f" like {target}")
        self.fingerprint: str | None = None

    def identity(self, cache_dir: Path, val_fraction: float) -> str:
        """SHA-256 of both texts and of how the pieces are chosen; a hub corpus without one: its name and revision."""
        parts = [self.corpus.identity(cache_dir, val_fraction), self.method, self.share, self.length]
        parts += [] if self.method == "zip" else [self.seed]  # nothing is drawn there
        if self.target is not None:
            parts.append(self.target.identity(cache_dir, val_fraction))
        self.fingerprint = hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()
        return self.fingerprint

    def documents(self, val_fraction: float) -> Iterator[Document]:
        """Call `identity` with the same val_fraction first. Reads the training text twice."""
        scores = METHODS[self.method](self, val_fraction)
        fit = int(np.isfinite(scores).sum())
        count = round(self.share * len(scores))
        if not 0 < count <= fit:
            raise ValueError(
                f"data.selection.share = {self.share} of {len(scores)} pieces is {count}, but {fit} are long enough to "
                f"be judged; give more text, another share or a smaller data.selection.length"
            )
        keep = np.zeros(len(scores), dtype=bool)
        keep[np.argsort(-scores, kind="stable")[:count]] = True
        number = 0
        for document in self.corpus.documents(val_fraction):
            if document.split != "train":
                yield document
                continue
            run: list[str] = []
            for piece in cut(document.pieces, self.length):
                if keep[number]:
                    run.append(piece)
                elif run:
                    yield Document("train", iter(run), ends=False)
                    run = []
                number += 1
            if run:
                yield Document("train", iter(run), document.ends)

    def pieces(self, val_fraction: float) -> Iterator[str]:
        for document in self.corpus.documents(val_fraction):
            if document.split == "train":
                yield from cut(document.pieces, self.length)

    def examples(self, val_fraction: float) -> Iterator[str]:
        """The target's pieces, of all its documents."""
        for document in self.target.documents(val_fraction):
            yield from cut(document.pieces, self.length)


def cut(pieces: Iterator[str], length: int) -> Iterator[str]:
    """A document in parts of `length` characters; the last one has the rest, up to half as much again."""
    buffer = ""
    for piece in pieces:
        buffer += piece
        start = 0
        while len(buffer) - start > 1.5 * length:
            yield buffer[start : start + length]
            start += length
        buffer = buffer[start:]
    if buffer:
        yield buffer


def by_importance(selection: SelectedCorpus, val_fraction: float) -> np.ndarray:
    """log w (pieces) with Gumbel noise; -inf for pieces that are too short."""
    target = bag(selection.examples(val_fraction), "the target")
    corpus = bag(selection.pieces(val_fraction), "the text")
    ratio = np.log(target + 1e-8) - np.log(corpus + 1e-8)  # (buckets)
    noise = np.random.default_rng(selection.seed)
    scores = []
    for piece in selection.pieces(val_fraction):
        found = WORD.findall(piece.lower())
        gumbel = noise.gumbel()
        scores.append(ratio[buckets(found)].sum() + gumbel if len(found) >= LEAST_WORDS else -np.inf)
    return np.array(scores)


def bag(pieces: Iterator[str], what: str) -> np.ndarray:
    """Shares of the buckets (buckets), of all unigrams and bigrams together."""
    counts = np.zeros(BUCKETS)
    for piece in pieces:
        counts += np.bincount(buckets(WORD.findall(piece.lower())), minlength=BUCKETS)
    if not counts.any():
        raise ValueError(f"data.selection: {what} holds no words")
    return counts / counts.sum()


def buckets(words: list[str]) -> np.ndarray:
    """Of every unigram and bigram (n)."""
    grams = words + [f"{a} {b}" for a, b in zip(words, words[1:])]
    return np.fromiter(map(bucket, grams), dtype=np.int64, count=len(grams))


@lru_cache(maxsize=1 << 18)
def bucket(gram: str) -> int:
    return int(hashlib.sha256(gram.encode("utf-8", "surrogatepass")).hexdigest(), 16) % BUCKETS


def by_compression(selection: SelectedCorpus, val_fraction: float) -> np.ndarray:
    """Alignment (pieces) with the target; at most EXAMPLES of its pieces, evenly over it."""
    examples = [piece.encode() for piece in selection.examples(val_fraction)]
    examples = (
        [examples[i * len(examples) // EXAMPLES] for i in range(EXAMPLES)] if len(examples) > EXAMPLES else examples
    )
    alone = np.array([compressed(example) for example in examples])
    scores = []
    for piece in selection.pieces(val_fraction):
        text = piece.encode()
        own, both = compressed(text), np.array([compressed(text + example) for example in examples])
        scores.append(1 - np.mean((both - np.minimum(own, alone)) / np.maximum(own, alone)))
    return np.array(scores)


def compressed(text: bytes) -> int:
    return len(zlib.compress(text, 6))


def by_chance(selection: SelectedCorpus, val_fraction: float) -> np.ndarray:
    return np.random.default_rng(selection.seed).random(sum(1 for _ in selection.pieces(val_fraction)))


def selected(
    corpus: FileCorpus | HuggingFaceCorpus, options: Mapping[str, Any] | None, seed: int
) -> FileCorpus | HuggingFaceCorpus | SelectedCorpus:
    """The corpus, or what the dict data.selection leaves of it. Without a target: all, unless it is a draw."""
    defaults = {n: p.default for n, p in inspect.signature(SelectedCorpus).parameters.items()}
    defaults = {name: value for name, value in defaults.items() if name not in ("corpus", "seed")}
    check_slot("data.selection", options, list(defaults), "data.selection")
    options = defaults | dict(options or {})
    if options["target"] is None and options["method"] != "random":
        if changed := [name for name, value in options.items() if value != defaults[name]]:
            raise ValueError(
                f"data.selection.{changed[0]} = {options[changed[0]]} does nothing without data.selection.target; name "
                f"text that the chosen pieces should be like"
            )
        return corpus
    return SelectedCorpus(corpus, **options, seed=seed)


METHODS: dict[str, Callable[[SelectedCorpus, float], np.ndarray]] = {
    "dsir": by_importance,
    "zip": by_compression,
    "random": by_chance,
}
