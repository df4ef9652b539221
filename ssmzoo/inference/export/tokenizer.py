"""A run's tokenizer as the files that transformers reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ssmzoo.data.text_tokenizer import ByteTokenizer, Tokenizer

PAD_BYTE = 0xFF  # occurs in no UTF-8 text, so that its row of the vocabulary is free for padding
PAD = "<pad>"


def fast_tokenizer(tokenizer: Tokenizer):
    """The same vocabulary as a `tokenizers.Tokenizer`; bytes become one whose ids are the bytes."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers

    if not isinstance(tokenizer, ByteTokenizer):
        return tokenizer.tokenizer
    vocab = {PAD if byte == PAD_BYTE else char: byte for byte, char in enumerate(_characters())}
    fast = Fast(models.BPE(vocab=vocab, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([PAD])
    return fast


def _characters() -> list[str]:
    """The printable character that stands for each byte in GPT-2's byte-level vocabularies."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def special_tokens(tokenizer: Tokenizer | None) -> dict[str, int | None]:
    """eos_token_id, bos_token_id and pad_token_id of a vocabulary; None for what it does not have."""
    if tokenizer is None:
        return {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    if isinstance(tokenizer, ByteTokenizer):
        return {"bos_token_id": None, "eos_token_id": None, "pad_token_id": PAD_BYTE}
    end = tokenizer.end_token
    return {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}


def save_tokenizer(tokenizer: Tokenizer | None, folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json; nothing for a model without a tokenizer."""
    if tokenizer is None:
        return
    fast = fast_tokenizer(tokenizer)
    fast.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
        "model_max_length": 10**30,
    }
    for name, number in special_tokens(tokenizer).items():
        if number is not None:
            config[name.removesuffix("_id")] = fast.id_to_token(number)
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
