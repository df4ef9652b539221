"""Text for language models: any corpus, tokenised once, packed into windows of fixed length."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from lightning.pytorch import LightningDataModule

from ssmzoo.data.loader import ResumableLoader, is_fitting, refuse_other_data
from ssmzoo.data.text_corpus import FileCorpus
from ssmzoo.data.text_hub import HuggingFaceCorpus
from ssmzoo.data.text_selection import selected
from ssmzoo.data.text_store import FORMAT, Split, Store, build_store, cache_folder, open_store
from ssmzoo.data.text_tokenizer import ByteTokenizer, JsonTokenizer, Tokenizer, digest, from_dict, train_bpe
from ssmzoo.data.text_windows import Windows
from ssmzoo.suggest import argument_names, check_slot

log = logging.getLogger(__name__)

BPE_SAMPLE = 1 << 30  # characters a BPE is trained on at most


class TextData(LightningDataModule):
    """Packed windows of text with the next token as label, a held-out split, and the tokenizer.

    path            text file, folder or glob, by suffix also .jsonl, .csv, .tsv, .parquet and compressed ones; None:
                    the running Python's standard library (see FileCorpus)
    text_field      field or column of the text in such files of records; None: "text"
    corpus          in place of path: the arguments of a HuggingFaceCorpus as a dict, or any corpus object
    selection       train on the part of it that is most like a target: the arguments of a SelectedCorpus as a dict
    tokenizer       "bytes"; "bpe", learnt on the training split; the path of a tokenizer.json; or what a tokenizer's
                    `to_dict` gave, to read other text with a trained model's vocabulary
    end_token       what every document ends with: "auto" (the tokenizer's end token where it has one), "none", or a
                    token of the vocabulary (of a BPE to be learnt: made for it)
    bpe_vocab_size  tokens of a learnt BPE, 4096 if not given (a small corpus may give fewer)
    seq_len         tokens per window; batch_size: windows per step and process
    val_fraction    share of the text that is held out, by document
    val_tokens      validate on the first so many tokens of the held-out split; None: on all of it
    shuffle         windows in another order and from another starting position every epoch; False: as they stand
    seed            decides the order, together with epoch and position
    num_workers     processes that prepare batches; 0 is fast enough for most machines
    cache_dir       where tokenised corpora are kept; None: $SSMZOO_CACHE or ~/.cache/ssmzoo

    A batch is {"input_ids" (b l), "labels" (b l), "seq_idx" (b l)}: labels are -100 where nothing is to be predicted,
    which includes the first token of every document; seq_idx changes where a new document begins.

    Raises ValueError for arguments out of range, and for a corpus that is missing, empty, not text or too short.
    """

    def __init__(
        self,
        path: str | None = None,
        corpus: dict | FileCorpus | HuggingFaceCorpus | None = None,
        tokenizer: str | dict = "bytes",
        bpe_vocab_size: int | None = None,
        seq_len: int = 256,
        batch_size: int = 16,
        val_fraction: float = 0.05,
        val_tokens: int | None = 65_536,
        shuffle: bool = True,
        seed: int = 0,
        num_workers: int = 0,
        cache_dir: str | None = None,
        text_field: str | None = None,
        end_token: str | None = "auto",
        selection: dict | None = None,
    ):
        super().__init__()
        if path is not None and corpus is not None:
            raise ValueError(f"data.path = '{path}' and data.corpus are both given; data=text goes with data.path")
        if text_field is not None and corpus is not None:
            raise ValueError(
                f"data.text_field = '{text_field}' goes with data.path; a Hugging Face dataset has "
                f"data.corpus.text_column"
            )
        if bpe_vocab_size is not None and tokenizer != "bpe":
            raise ValueError(
                f"data.bpe_vocab_size = {bpe_vocab_size} does nothing for data.tokenizer = '{tokenizer}'; "
                f"drop it, or choose data.tokenizer=bpe"
            )
        _check_sizes(
            seq_len=(seq_len, 1), batch_size=(batch_size, 1), val_tokens=(val_tokens, 2), num_workers=(num_workers, 0)
        )
        if not 0 < val_fraction < 1:
            raise ValueError(f"data.val_fraction = {val_fraction}; give a share between 0 and 1, such as 0.05")
        corpus = _hub_corpus(corpus) if isinstance(corpus, Mapping) else corpus or FileCorpus(path, text_field)
        self.corpus = selected(corpus, selection, seed)
        self.seq_len, self.batch_size, self.shuffle, self.seed = seq_len, batch_size, shuffle, seed
        self.val_fraction, self.val_tokens, self.num_workers = val_fraction, val_tokens, num_workers
        self.cache_dir = cache_folder(cache_dir)
        self._given: Tokenizer | None = _named_tokenizer(tokenizer)
        if self._given is not None and end_token != "auto":
            self._given.ending(end_token)
        self._end_of_bpe = None if end_token in ("auto", "none") else end_token
        self._bpe_vocab_size = bpe_vocab_size or 4096
        self._store: Store | None = None

    # Lightning's hooks

    def prepare_data(self) -> None:
        self._open()

    def setup(self, stage: str | None = None) -> None:
        self._open()

    def train_dataloader(self) -> ResumableLoader:
        return self._loader("train", limit=None, shuffle=self.shuffle)

    def val_dataloader(self) -> ResumableLoader:
        return self._loader("val", limit=self.val_tokens, shuffle=False)

    def state_dict(self) -> dict:
        """What a run that continues must share with the one before; the position in the epoch is the loader's state."""
        return {
            "corpus": self.fingerprint,
            "tokenizer": digest(self.tokenizer),
            "seq_len": self.seq_len,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "val_fraction": self.val_fraction,
            "end_token": self.tokenizer.end_token,
        }

    def load_state_dict(self, state: dict) -> None:
        if is_fitting(self) and "end_token" not in state and self._given is not None:  # from before documents had one
            self._given.ending(None)
            self._store = None
        refuse_other_data(self, state)

    # What others may ask

    @property
    def sizes(self) -> dict[str, int]:
        """Numbers that a model's config may refer to."""
        return {"vocab_size": self.tokenizer.vocab_size}

    @property
    def tokenizer(self) -> Tokenizer:
        return self._given or self._open().tokenizer

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the corpus: of the names and contents of its files, or of its rows."""
        return self._open().meta["fingerprint"]

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text)

    def decode(self, ids) -> str:
        return self.tokenizer.decode(ids)

    def with_seq_len(self, seq_len: int, batch_size: int) -> TextData:
        """The same text in windows of another length; validation uses the same held-out tokens."""
        other = copy.copy(self)
        _check_sizes(seq_len=(seq_len, 1), batch_size=(batch_size, 1))
        other.seq_len, other.batch_size = seq_len, batch_size
        return other

    def tokens(self, split: str) -> np.ndarray:
        """The ids of all documents of "train" or "val", one after another; mapped into memory, not read."""
        return self._side(split).tokens

    def bytes_per_token(self, split: str = "val") -> float:
        """UTF-8 bytes per token; nats per token / (ln 2 * this) = bits per byte."""
        side = self._side(split)
        return side.n_bytes / len(side.tokens)

    def token_counts(self, split: str) -> np.ndarray:
        """How often each id occurs (v): in the whole training split, or in what validation uses of the held-out one."""
        side = self._side(split)
        if split == "train" or self.val_tokens is None or self.val_tokens >= len(side.tokens):
            return np.array(side.counts)
        return np.bincount(side.tokens[: self.val_tokens], minlength=len(side.counts))

    def describe(self) -> dict:
        """The corpus in figures, for reports and manifests."""
        meta = self._open().meta
        return {
            "corpus": meta["corpus"],
            "fingerprint": meta["fingerprint"],
            "tokenizer": meta["tokenizer"],
            "vocab_size": meta["vocab_size"],
            "end_token": meta["end_token"],
        } | {
            f"{split}_{what}": meta["splits"][split][what]
            for split in ("train", "val")
            for what in ("bytes", "tokens", "documents")
        }

    # How it is done

    def _side(self, split: str) -> Split:
        if split not in ("train", "val"):
            raise ValueError(f"split is '{split}'; expected 'train' or 'val'")
        store = self._open()
        return store.train if split == "train" else store.val

    def _loader(self, split: str, limit: int | None, shuffle: bool) -> ResumableLoader:
        trainer = self.trainer
        rank, world = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        windows = Windows(
            self._side(split), self.seq_len, seed=self.seed if shuffle else None, limit=limit, multiple_of=world
        )
        return ResumableLoader(
            windows,
            self.batch_size,
            shuffle=shuffle,
            seed=self.seed,
            num_workers=self.num_workers,
            rank=rank,
            world_size=world,
        )

    def _open(self) -> Store:
        """The tokenised corpus, written if there is none yet."""
        if self._store is None:
            self._store = self._find_or_build()
        return self._store

    def _find_or_build(self) -> Store:
        root = self.cache_dir / "text"
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"the cache folder {root} cannot be made ({error.strerror}); set SSMZOO_CACHE or "
                f"data.cache_dir to a folder that can be written"
            ) from error
        identity = self.corpus.identity(self.cache_dir, self.val_fraction)
        kind = f"bpe-{self._bpe_vocab_size}" if self._given is None else digest(self._given)[:12]
        end = self._end_of_bpe if self._given is None else self._given.end_token
        if end is not None:
            kind += f"-end-{hashlib.sha256(str(end).encode()).hexdigest()[:8]}"
        folder = root / f"{identity[:16]}-{kind}-{self.val_fraction:g}-v{FORMAT}"
        store = open_store(folder)
        if store is None:
            build_store(folder, self.corpus, self._given or self._learn_bpe(), self.val_fraction)
            store = open_store(folder)
            log.info("tokenised '%s' into %s", self.corpus.name, folder)
        self._check_length(store, folder)
        return store

    def _learn_bpe(self) -> JsonTokenizer:
        def sample():
            left = BPE_SAMPLE
            for document in self.corpus.documents(self.val_fraction):
                for piece in document.pieces if document.split == "train" else ():
                    yield piece
                    left -= len(piece)
                    if left <= 0:
                        return

        log.info("learning a BPE of %d tokens on '%s'", self._bpe_vocab_size, self.corpus.name)
        return train_bpe(sample(), self._bpe_vocab_size, self._end_of_bpe)

    def _check_length(self, store: Store, folder: Path) -> None:
        n, held_out = len(store.train.tokens), len(store.val.tokens)
        if n <= self.seq_len:
            remedy = f"choose data.seq_len below {n} or give more text" if n > 1 else "give more text"
            raise ValueError(
                f"data.path: '{self.corpus.name}' has {n} tokens to train on, too few for one sequence of "
                f"data.seq_len = {self.seq_len} and its next token; {remedy}"
            )
        if held_out < 2:
            raise ValueError(
                f"'{self.corpus.name}' has {held_out} held-out token(s) with data.val_fraction = "
                f"{self.val_fraction}; raise it, give more text, or name data.corpus.val_split"
            )


def _check_sizes(**sizes: tuple[int | None, int]) -> None:
    """name=(value, the least that makes sense)"""
    for name, (value, least) in sizes.items():
        if value is not None and value < least:
            raise ValueError(f"data.{name} = {value}; it must be at least {least}")


def _hub_corpus(arguments: Mapping) -> HuggingFaceCorpus:
    check_slot("data.corpus", arguments, argument_names(HuggingFaceCorpus), "data.corpus")
    if not arguments.get("name"):
        raise ValueError("data.corpus.name is missing; name a Hugging Face dataset, such as roneneldan/TinyStories")
    return HuggingFaceCorpus(**arguments)


def _named_tokenizer(name: str | Mapping) -> Tokenizer | None:
    """None for a BPE that is still to be learnt."""
    if isinstance(name, Mapping):
        return from_dict(dict(name))
    if name == "bytes":
        return ByteTokenizer()
    if Path(name).name == "manifest.json":  # of a checkpoint
        return from_dict(json.loads(Path(name).read_text("utf-8")).get("tokenizer"))
    return None if name == "bpe" else JsonTokenizer.from_file(name)
