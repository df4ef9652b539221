"""The objectives of Birdie: text in, (what the model reads, what it answers) out.

Each is `f(tokens, space, rng, encode, ...) -> Sample`, where `tokens` (n) are ids of a text of any length, `space` how
many ids input and answer may take together, and `encode` makes ids of the markers. The order in which random numbers
are drawn is the released code's, so that a seed gives its samples. None: the text or the space is too short.

    next_token        <|NTP|>                     ->  text
    prefix_lm         <|PREFIX LM|>  beginning    ->  rest
    copying           <|COPY|>  text              ->  text
    deshuffling       <|DESHUFFLE|>  shuffled     ->  text
    infilling         <|INFILL|>  text with numbered holes      ->  number and content of every hole
    autoencoding      <|AUTOENCODE|>  text with numbered holes  ->  text       (and with what is left shuffled)
    selective_copying what stands before and after spans, context  ->  the spans

Sources: Blouir et al. 2024 (arXiv 2411.01030), section 3.2 and appendix A; samblouir/birdie for the order of draws.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

Encode = Callable[[str], Sequence[int]]
ATTEMPTS = 100  # to find a place for at least one hole or span
SPARE = 16  # ids that the objectives with holes keep free


class Sample(NamedTuple):
    """inputs (i), labels (j) ids; used: how many tokens of the text they are made of."""

    inputs: np.ndarray
    labels: np.ndarray
    used: int


def sample(inputs: Sequence, labels: Sequence, used: int) -> Sample | None:
    """None without anything to answer."""
    if not len(labels):
        return None
    return Sample(np.asarray(inputs, dtype=np.int64), np.asarray(labels, dtype=np.int64), used)


def next_token(tokens, space: int, rng, encode: Encode, published: bool = False) -> Sample | None:
    """published: the released input, which holds the text as well and so takes half of the space for it."""
    marker = encode("<|NTP|>")
    if not published:
        text = tokens[: max(0, space - len(marker))]
        return sample(marker, text, len(text))
    text = tokens[: max(0, (space - len(marker)) // 2)]
    return sample([*marker, *text], text, len(text))


def prefix_lm(tokens, space: int, rng, encode: Encode, fraction: float = 0.75) -> Sample | None:
    """fraction: share of the text that is given."""
    marker = encode("<|PREFIX LM|>")
    text = tokens[: max(0, space - len(marker))]
    cut = int(len(text) * fraction)
    return sample([*marker, *text[:cut]], text[cut:], len(text))


def copying(tokens, space: int, rng, encode: Encode) -> Sample | None:
    marker = encode("<|COPY|>")
    text = tokens[: max(0, (space - len(marker)) // 2)]
    return sample([*marker, *text], text, len(text))


def deshuffling(tokens, space: int, rng, encode: Encode, rate: float = 0.75) -> Sample | None:
    """rate: share of the positions whose tokens change places."""
    marker = encode("<|DESHUFFLE|>")
    text = np.asarray(tokens[: max(0, int((space // 2) * 0.9 - len(marker)))])
    shuffled, moved = text.copy(), int(len(text) * rate)
    if moved:
        at = rng.choice(len(text), moved, replace=False)
        shuffled[at] = rng.permutation(shuffled[at])
    return sample([*marker, *shuffled], text, len(text))


def infilling(
    tokens, space: int, rng, encode: Encode, rate: float = 0.15, span: float = 3.0, max_spans: int = 20
) -> Sample | None:
    """rate: share of the text in holes, about; span: their mean length; max_spans: the text ends behind so many."""
    marker = encode("<|INFILL|>")
    length = min(len(tokens), space - len(marker) - SPARE)
    bounds = max(1.0, span / 3), max(1.0, span * 3)
    for _ in range(ATTEMPTS if length > 0 else 0):
        inputs, labels, count, at = list(marker), [], 0, 0
        while at < length and count < max_spans and len(inputs) + len(labels) < space:
            hole = _hole(rng, rate, span, bounds, length - at)
            name = encode(f" [[mask_{count}]]") if hole else ()
            if hole and len(inputs) + len(labels) + 2 * len(name) + hole <= space:
                inputs += name
                labels += [*name, *tokens[at : at + hole]]
                count, at = count + 1, at + hole
            elif len(inputs) + len(labels) < space:
                inputs.append(tokens[at])
                at += 1
        if count:
            return sample(inputs, labels, at)
    return None


def autoencoding(
    tokens, space: int, rng, encode: Encode, rate: float = 0.5, span: int = 3, shuffle: bool = False
) -> Sample | None:
    """rate, span: as for infilling; shuffle: what is left between the holes changes places."""
    marker = encode("<|AUTOENCODE + DESHUFFLE|>" if shuffle else "<|AUTOENCODE|>")
    length = min(len(tokens), space - len(marker) - SPARE)
    bounds = max(1, span // 3), max(1, span * 3)
    for _ in range(ATTEMPTS if length > 0 else 0):
        pieces, size, count, at = [[]], len(marker), 0, 0  # kept, hole, kept, hole, ..., kept
        while at < length and size + at < space:
            hole = _hole(rng, rate, span, bounds, length - at)
            name = encode(f" [[mask_{count}]]") if hole else ()
            if hole and size + len(name) + at + hole <= space:
                pieces += [list(name), []]
                size, count, at = size + len(name), count + 1, at + hole
            elif size + 1 + at + 1 <= space:
                pieces[-1].append(tokens[at])
                size, at = size + 1, at + 1
            else:
                break
        if count:
            if shuffle:
                kept = pieces[::2]
                pieces[::2] = [kept[i] for i in rng.permutation(len(kept))]
            return sample([*marker, *(i for piece in pieces for i in piece)], tokens[:at], at)
    return None


def _hole(rng, rate: float, span: float, bounds: tuple[float, float], room: int) -> int:
    """The length of a hole that begins here, 0 for none: three draws."""
    rate = rng.uniform(rate * 0.5, min(0.95, rate * 2))
    length = int(max(1, min(max(rng.poisson(span), bounds[0]), bounds[1], room)))
    return length if rng.uniform() < rate / length and length <= room else 0


def selective_copying(
    tokens,
    space: int,
    rng,
    encode: Encode,
    rate: float = 0.5,
    span: int = 8,
    before: tuple[int, int] = (2, 8),
    after: tuple[int, int] = (2, 8),
    query_first: bool = True,
    max_spans: int | None = None,
    whole_context: bool = True,
) -> Sample | None:
    """Spans are asked for by what stands before and after them, in the order of a permutation.

    rate, span     how readily a span is taken, and its mean length
    before, after  least and greatest length of the delimiters
    query_first    the questions come before the context, otherwise behind it
    whole_context  the context reaches to the last span asked for; False: the released code's, which cuts it to what
                   the questions leave and may ask for what is not there
    """
    marker, opening, closing = encode("<|Selective Copying|>"), encode("\n\n[ctx]\n"), encode("\n[/ctx]")
    done, least, most = encode("\n\n[done]"), max(1, span // 3), max(1, span * 3)
    fixed = len(marker) + len(opening) + len(closing) + len(done)
    length = min(len(tokens), space - fixed - 38)
    separator = encode("\n[sep]\n")
    for _ in range(ATTEMPTS if length >= before[0] + least + after[0] else 0):
        found, size, at = [], 0, before[0]
        while at <= length - after[0] - least and (max_spans is None or len(found) < max_spans):
            taken = max(least, min(max(rng.poisson(span), least), most, length - after[0] - at))
            ready = rng.uniform(rate * 0.5, min(0.95, rate * 2))
            if rng.uniform() >= ready:
                at += rng.integers(1, least + 1)
                continue
            left = rng.integers(before[0], min(at, before[1]) + 1)
            end = at + taken
            right = rng.integers(after[0], min(length - end, after[1]) + 1)
            number, gap = len(found), 2 * bool(found)
            size += left + len(separator) + right + taken + len(encode(f"\n\n[find {number}]\n"))
            size += len(encode(f"\n[/find {number}]")) + len(encode(f"[res {number}]\n")) + gap
            if fixed + size + (max(10, end + right) if whole_context else 10) > space:
                break
            found.append((tokens[at - left : at], tokens[at:end], tokens[end : end + right]))
            at = end + right + rng.integers(1, max(1, before[0] // 2) + 1)
        if not found:
            continue
        questions, answers = [], []
        for number, i in enumerate(rng.permutation(len(found))):
            left, hidden, right = found[i]
            questions += [*encode(f"\n\n[find {number}]\n"), *left, *separator, *right]
            questions += encode(f"\n[/find {number}]")
            answers += [*encode("\n\n" * bool(answers) + f"[res {number}]\n"), *hidden]
        room = space - fixed - len(questions) - len(answers)
        if room < 10:
            continue
        used = min(length, room)
        context = [*opening, *tokens[:used], *closing]
        inputs = [*marker, *questions, *context] if query_first else [*marker, *context, *questions]
        return sample(inputs, [*answers, *done], used)
    return None


OBJECTIVES = {
    f.__name__: f for f in (next_token, prefix_lm, copying, deshuffling, infilling, autoencoding, selective_copying)
}
