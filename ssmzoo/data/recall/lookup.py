"""Recall in text, byte by byte: numbers out of a phone book, and facts hidden in a real text.

Sources: Birdie (Blouir et al. 2024, arXiv 2411.01030, phone book). Names and numbers are made up by seed. Every
function returns (inputs (n length), labels (n length)), int64; labels are the digits asked for and -100 elsewhere.
"""

from __future__ import annotations

import numpy as np

from ssmzoo.data.recall.associative import IGNORE, Arrays
from ssmzoo.data.recall.draws import Draws

CONSONANTS, VOWELS = np.frombuffer(b"bdfgklmnprstvz", np.uint8), np.frombuffer(b"aeiou", np.uint8)
SYLLABLES = 3
NAMES = (len(CONSONANTS) * len(VOWELS)) ** SYLLABLES  # 343,000 of six letters


def _names(draws: Draws, n: int, m: int) -> np.ndarray:
    """(n m 6) letters of different names."""
    wanted = draws.integers(0, NAMES, (n, m))
    while True:
        ordered = np.sort(wanted, axis=1)
        twice = (ordered[:, 1:] == ordered[:, :-1]).any(1)
        if not twice.any():
            break
        wanted[twice] = draws.integers(0, NAMES, (int(twice.sum()), m))
    letters = []
    for _ in range(SYLLABLES):
        wanted, syllable = np.divmod(wanted, len(CONSONANTS) * len(VOWELS))
        letters += [CONSONANTS[syllable // len(VOWELS)], VOWELS[syllable % len(VOWELS)]]
    names = np.stack(letters, -1)
    names[..., 0] -= 32  # a capital
    return names


def _repeat(text: str, shape: tuple[int, ...]) -> np.ndarray:
    return np.broadcast_to(np.frombuffer(text.encode(), np.uint8), (*shape, len(text)))


def _listed(items: np.ndarray, end: str) -> np.ndarray:
    """(n k w) -> (n k * (w + 2) - 2 + len(end)): joined by ", "."""
    n, k, _ = items.shape
    joined = np.concatenate([items, _repeat(", ", (n, k))], -1).reshape(n, -1)
    return np.concatenate([joined[:, :-2], _repeat(end, (n,))], 1)


def phone_book(draws: Draws, n: int, entries: int, asked: int, vocab_size: int = 256) -> Arrays:
    """A book of `entries` lines "Name: 123-456-7890"; the question for `asked` of them before and after it; then the
    numbers, whose digits are asked."""
    names, digits = _names(draws, n, entries), draws.integers(48, 58, (n, entries, 10)).astype(np.uint8)
    dash = _repeat("-", (n, entries))
    numbers = np.concatenate([digits[..., :3], dash, digits[..., 3:6], dash, digits[..., 6:]], -1)  # (n e 12)
    lines = np.concatenate([names, _repeat(": ", (n, entries)), numbers, _repeat("\n", (n, entries))], -1)
    which = draws.distinct(0, entries, n, asked)[..., None]
    question = np.concatenate([_repeat("Numbers of ", (n,)), _listed(np.take_along_axis(names, which, 1), "?\n")], 1)
    answer = _listed(np.take_along_axis(numbers, which, 1), "\n")
    text = np.concatenate([question, _repeat("Phonebook:\n", (n,)), lines.reshape(n, -1), question, answer], 1)
    return _digits_asked(text, answer.shape[1])


def needle(draws: Draws, n: int, length: int, needles: int, haystack: np.ndarray, vocab_size: int = 256) -> Arrays:
    """`length` + 1 bytes of a text with `needles` facts "The number of Name is 12345." at random positions; at the
    end one of them is begun again and its digits are asked. haystack: (bytes) uint8, longer than `length`."""
    names, digits = _names(draws, n, needles), draws.integers(48, 58, (n, needles, 5)).astype(np.uint8)
    shape = (n, needles)
    begun = np.concatenate([_repeat("\nThe number of ", shape), names, _repeat(" is ", shape)], -1)
    facts = np.concatenate([begun, digits, _repeat(".\n", shape)], -1)  # (n needles f)
    rows, which = np.arange(n), draws.integers(0, needles, (n,))
    end = np.concatenate([begun[rows, which], digits[rows, which], _repeat(".\n", (n,))], 1)
    hay = length + 1 - end.shape[1] - needles * facts.shape[2]
    start = draws.integers(0, len(haystack) - hay, (n,))
    text = haystack[start[:, None] + np.arange(hay)]  # (n hay)
    cuts = np.sort(draws.integers(0, hay + 1, shape), axis=1)
    rank = (np.arange(hay)[None, :, None] >= cuts[:, None, :]).sum(-1)  # facts before every byte of the text
    whole = np.empty((n, hay + facts.shape[1] * facts.shape[2]), np.uint8)
    np.put_along_axis(whole, np.arange(hay) + rank * facts.shape[2], text, 1)
    at = (cuts + np.arange(needles) * facts.shape[2])[..., None] + np.arange(facts.shape[2])
    np.put_along_axis(whole, at.reshape(n, -1), facts.reshape(n, -1), 1)
    return _digits_asked(np.concatenate([whole, end], 1), 7)


def _digits_asked(text: np.ndarray, answer: int) -> Arrays:
    """Next-byte prediction of a text (n l + 1) with labels at the digits of its last `answer` bytes."""
    text = text.astype(np.int64)
    inputs, labels = text[:, :-1], text[:, 1:].copy()
    asked = (labels >= 48) & (labels < 58) & (np.arange(labels.shape[1]) >= labels.shape[1] - answer)
    return inputs, np.where(asked, labels, IGNORE)
