"""From text to token ids and back: raw bytes, or any tokenizer of the Hugging Face `tokenizers` library.

A tokenizer describes itself as a plain dict (`to_dict`, `from_dict`) that a checkpoint's manifest can carry, so that a
model is never separated from its vocabulary.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

END_TOKENS = (  # what tokenizers call the end of a text, the most telling first
    "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "<EOS>", "<|im_end|>",
)  # fmt: skip
_LONGEST_CHARACTER = 16  # tokens; an invalid byte sequence is given up after as many


class ByteTokenizer:
    """Every byte of the UTF-8 text is a token: 256 ids, nothing to learn, nothing unknown."""

    name = "bytes"
    vocab_size = 256
    end_token = None

    def ending(self, token: str | None) -> ByteTokenizer:
        """Without an end token, the only way there is; ValueError for another."""
        if token not in (None, "auto", "none"):
            raise ValueError(f"data.end_token = '{token}': the 256 bytes have no such token; use data.tokenizer=bpe")
        return self

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8", "surrogateescape"))  # a command line may hold bytes that are not UTF-8

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode("utf-8", "replace"), dtype=np.uint8) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(int(i) for i in ids).decode("utf-8", "replace")

    def decoder(self) -> StreamDecoder:
        return _ByteDecoder()

    def to_dict(self) -> dict[str, str]:
        return {"type": "bytes"}


class JsonTokenizer:
    """A tokenizer of the `tokenizers` library, given as the text of its json file.

    end_token  the token that ends a document or its id; "auto": the first of END_TOKENS that it has; None: none. As an
               attribute, the id or None

    No special tokens are added around a text, nothing is truncated or padded. `name` is what messages call it.
    Raises ValueError when the text does not parse.
    """

    def __init__(self, text: str, name: str = "tokenizer", end_token: str | int | None = "auto"):
        from tokenizers import Tokenizer  # 50 ms that byte-level runs do not pay

        try:
            self.tokenizer = Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exceptions
            raise ValueError(
                f"data.tokenizer: '{name}' is not a tokenizer file of the `tokenizers` library ({error}); "
                f"give a tokenizer.json, or data.tokenizer=bytes"
            ) from error
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.name = name
        ids = self.tokenizer.get_vocab(with_added_tokens=True).values()
        self.vocab_size = max(ids, default=-1) + 1  # ids may have holes
        if self.vocab_size < 1:
            raise ValueError(f"data.tokenizer: the vocabulary of '{name}' is empty; give a trained tokenizer.json")
        self.end_token: int | None = None
        self.ending(end_token)

    def ending(self, token: str | int | None) -> JsonTokenizer:
        """Choose the end token: a token or its id, "auto" for the one it has, "none" or None for none."""
        if token in (None, "none"):
            self.end_token = None
        elif token == "auto":
            special = {t.content for t in self.tokenizer.get_added_tokens_decoder().values()}
            found = next((t for t in END_TOKENS if t in special), None)
            self.end_token = None if found is None else self.tokenizer.token_to_id(found)
        else:
            found = token if isinstance(token, int) else self.tokenizer.token_to_id(token)
            if found is None or not 0 <= found < self.vocab_size:
                raise ValueError(f"data.end_token = '{token}' is no token of '{self.name}'; choose one, auto or none")
            self.end_token = found
        return self

    @classmethod
    def from_file(cls, path: str | Path) -> JsonTokenizer:
        path = Path(path).expanduser()
        if not path.is_file():
            raise ValueError(f"data.tokenizer: '{path}' is neither 'bytes' nor 'bpe' nor an existing tokenizer.json")
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"data.tokenizer: '{path}' is not a json file ({error}); give a tokenizer.json of the "
                f"`tokenizers` library, or data.tokenizer=bytes"
            ) from error
        return cls(text, str(path), _configured_end(path.with_name("tokenizer_config.json")))

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        encodings = self.tokenizer.encode_batch(texts, add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=np.int64) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        return self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    def decoder(self) -> StreamDecoder:
        return _PieceDecoder(self.decode)

    def to_dict(self) -> dict[str, str]:
        about = {"type": "json", "name": self.name, "json": self.tokenizer.to_str()}
        return about if self.end_token is None else about | {"end_token": self.end_token}


def _configured_end(file: Path) -> str:
    """The end token that a tokenizer_config.json beside a tokenizer.json names, or "auto"."""
    try:
        found = json.loads(file.read_text("utf-8")).get("eos_token")
    except (OSError, ValueError, AttributeError, RecursionError):
        return "auto"
    found = found.get("content") if isinstance(found, dict) else found
    return found if isinstance(found, str) else "auto"


Tokenizer = ByteTokenizer | JsonTokenizer


def from_dict(description: dict[str, str]) -> Tokenizer:
    """The tokenizer that `to_dict` described. Raises ValueError for a description of another kind."""
    kind = description.get("type") if isinstance(description, dict) else None
    if kind == "bytes":
        return ByteTokenizer()
    if kind == "json" and isinstance(description.get("json"), str):
        return JsonTokenizer(description["json"], description.get("name", "tokenizer"), description.get("end_token"))
    raise ValueError(f"tokenizer type {kind!r} is unknown; expected 'bytes', or 'json' with the tokenizer in 'json'")


def digest(tokenizer: Tokenizer) -> str:
    """SHA-256 of what the tokenizer does; its name does not count."""
    description = tokenizer.to_dict()
    return hashlib.sha256(f"{description['type']}\0{description.get('json', '')}".encode()).hexdigest()


def train_bpe(texts: Iterable[str], vocab_size: int, end_token: str | None = None) -> JsonTokenizer:
    """Learn a byte-level BPE (GPT-2's pre-tokenisation, no unknown token, lossless) of at most `vocab_size` tokens,
    among them `end_token` if one is named."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < 257:
        raise ValueError(
            f"data.bpe_vocab_size = {vocab_size}; a byte-level BPE needs at least 257 tokens (256 bytes "
            f"and one merge), usual are 4096 to 50000; data.tokenizer=bytes has 256"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [end_token] if end_token else []
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False, special_tokens=special
    )
    tokenizer.train_from_iterator(texts, trainer)
    return JsonTokenizer(tokenizer.to_str(), f"bpe-{tokenizer.get_vocab_size()}", end_token)


class StreamDecoder(ABC):
    """Text from tokens that arrive one at a time: characters come out as soon as they are whole."""

    @abstractmethod
    def push(self, ids: Iterable[int]) -> str:
        """Take tokens and return the text that is whole by now."""

    @abstractmethod
    def flush(self) -> str:
        """What is left at the end; an unfinished character becomes U+FFFD."""


class _ByteDecoder(StreamDecoder):
    def __init__(self):
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Iterable[int]) -> str:
        return self.decoder.decode(bytes(int(i) for i in ids))

    def flush(self) -> str:
        return self.decoder.decode(b"", final=True)


class _PieceDecoder(StreamDecoder):
    """Decodes the new tokens behind the last finished ones, whose presence decides about spaces."""

    def __init__(self, decode: Callable[[list[int]], str]):
        self.decode, self.context, self.pending = decode, [], []

    def push(self, ids: Iterable[int]) -> str:
        self.pending += [int(i) for i in ids]
        text = self._text()
        if text.endswith("\N{REPLACEMENT CHARACTER}") and len(self.pending) < _LONGEST_CHARACTER:
            return ""
        self.context, self.pending = self.pending or self.context, []
        return text

    def flush(self) -> str:
        text, self.context, self.pending = self._text(), [], []
        return text

    def _text(self) -> str:
        return self.decode(self.context + self.pending)[len(self.decode(self.context)) :]
