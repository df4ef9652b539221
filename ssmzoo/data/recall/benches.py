"""The recall benches by name: what their two sizes mean, which sizes fit, and usual ones to train and test at."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from ssmzoo.data.recall import associative, copying, lookup

Case = tuple[int, int]
HIDDEN_FACT, ASKED_FACT = 34, 34  # bytes that a needle and the question at the end take of a text


class Bench(NamedTuple):
    """make     (draws, n, *case, vocab_size=..., **options) -> (inputs, labels)
    axes     what the two numbers of a case are;  options  further arguments that may be given
    vocab    usual number of tokens, or the only one (fixed)
    least    (case, vocab_size) -> why it does not fit, in words, or None
    train, test   usual cases; those of the test reach beyond training
    """

    make: Callable
    axes: tuple[str, str]
    least: Callable[[int, int, int], str | None]
    vocab: int
    train: tuple[Case, ...]
    test: tuple[Case, ...]
    options: tuple[str, ...] = ()
    fixed: bool = False


def _pairs(per_pair: int, parts: int, square: bool = False) -> Callable:
    """`per_pair` tokens per pair; tokens of the vocabulary in `parts` equal ones, of which the first holds the keys."""

    def least(length: int, pairs: int, vocab: int) -> str | None:
        if square and round(pairs**0.5) ** 2 != pairs:
            return f"{pairs} pairs are no square number; keys are all combinations, so take 4, 9, 16, ..."
        if length < per_pair * pairs:
            return f"{pairs} pairs need a length of at least {per_pair * pairs} ({per_pair} tokens a pair)"
        keys = round(pairs**0.5) if square else pairs
        needed = parts * max(keys + 1, pairs)
        return f"{pairs} pairs need data.vocab_size of at least {needed}" if vocab < needed else None

    return least


def _sets(short: int, long: int, vocab: int) -> str | None:
    needed = 4 + short + long
    return f"sets of {short} and {long} tokens need data.vocab_size of at least {needed}" if vocab < needed else None


def _copying(length: int, tokens: int, vocab: int) -> str | None:
    if length < 2 * tokens:
        return f"{tokens} tokens to copy need a length of at least {2 * tokens}"
    return "data.vocab_size must be at least 3 (a token, the zero and the marker)" if vocab < 3 else None


def _induction(length: int, heads: int, vocab: int) -> str | None:
    if heads != 1 or length < 3:
        return "give [length, 1] with a length of at least 3"
    return "data.vocab_size must be at least 3 (two tokens and the special one)" if vocab < 3 else None


def _bits(length: int, answers: int, vocab: int) -> str | None:
    return None if answers == 1 and length >= 2 else "give [length, 1] with a length of at least 2"


def _book(entries: int, asked: int, vocab: int) -> str | None:
    return None if 1 <= asked <= min(32, entries) else f"{asked} numbers of {entries} entries: ask for 1 to 32 of them"


def _needle(length: int, needles: int, vocab: int) -> str | None:
    needed = needles * HIDDEN_FACT + ASKED_FACT + 8
    return f"{needles} facts need a length of at least {needed} bytes" if length < needed else None


RECALL = ((32, 4), (64, 4), (64, 8))
BEYOND = ((32, 4), (32, 8), (64, 4), (64, 8), (64, 16), (128, 4), (128, 8), (128, 16), (256, 16))
BITS, LONGER = ((8, 1), (16, 1), (32, 1)), ((8, 1), (16, 1), (32, 1), (64, 1), (128, 1), (256, 1))
FILLERS = ("power", "random_fillers")

BENCHES = {
    "mqar": Bench(associative.mqar, ("length", "pairs"), _pairs(4, 2), 64, RECALL, BEYOND, FILLERS),
    "forgetting_mqar": Bench(
        associative.forgetting_mqar,
        ("length", "pairs"),
        _pairs(6, 2),
        64,
        ((32, 4), (64, 4), (64, 8)),
        ((32, 4), (64, 4), (64, 8), (128, 8), (128, 16), (256, 16)),
        ("updates", *FILLERS),
    ),
    "compositional_mqar": Bench(
        associative.compositional_mqar,
        ("length", "pairs"),
        _pairs(6, 3, square=True),
        256,
        ((64, 4), (64, 9), (128, 9)),
        ((64, 4), (64, 9), (128, 9), (128, 16), (256, 16), (256, 36)),
        FILLERS,
    ),
    "disjoint_sets": Bench(
        associative.disjoint_sets,
        ("short set", "long set"),
        _sets,
        512,
        ((4, 16), (16, 4), (8, 32), (32, 8)),
        ((4, 16), (16, 4), (8, 32), (32, 8), (16, 64), (64, 16), (4, 128), (128, 4)),
    ),
    "selective_copying": Bench(
        copying.selective_copying, ("length", "tokens"), _copying, 16, ((64, 8), (128, 16)),
        ((64, 8), (128, 8), (128, 16), (256, 16), (512, 16)),
    ),
    "induction_heads": Bench(
        copying.induction_heads, ("length", "heads"), _induction, 16, ((32, 1), (64, 1)),
        ((32, 1), (64, 1), (128, 1), (256, 1), (512, 1), (1024, 1)),
    ),
    "parity": Bench(copying.parity, ("length", "answers"), _bits, 3, BITS, LONGER, fixed=True),
    "majority": Bench(copying.majority, ("length", "answers"), _bits, 3, BITS, LONGER, fixed=True),
    "cumulative_parity": Bench(copying.cumulative_parity, ("length", "answers"), _bits, 3, BITS, LONGER, fixed=True),
    "cumulative_majority": Bench(
        copying.cumulative_majority, ("length", "answers"), _bits, 3, BITS, LONGER, fixed=True
    ),
    "phone_book": Bench(
        lookup.phone_book, ("entries", "asked"), _book, 256, ((4, 1), (8, 1), (8, 2)),
        ((4, 1), (8, 1), (8, 2), (16, 1), (16, 4), (32, 1), (32, 8), (32, 32)), fixed=True,
    ),
    "needle": Bench(
        lookup.needle, ("length", "needles"), _needle, 256, ((256, 1), (256, 2)),
        ((256, 1), (256, 2), (512, 1), (512, 4), (1024, 1), (1024, 8)), ("haystack",), fixed=True,
    ),
}  # fmt: skip
