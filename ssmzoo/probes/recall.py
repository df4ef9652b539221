"""Recall and copying against distance, for any language model, without training for it.

    copy     [ w_1 .. w_m | filler of length g | w_1 .. w_m ]   accuracy and loss on the second w_3 .. w_m
    recall   [ k v | filler of length g | k ] -> v              accuracy and log-probability gained over a novel pair

Words and filler are drawn from the tokens of real text when some is given, uniformly otherwise.

b sequences, m words, g gap (distance in tokens).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Curve(NamedTuple):
    """By distance: share of right tokens (%), loss in nats per token, and the same loss for a novel pattern."""

    distances: list[int]
    accuracy: Tensor
    loss: Tensor
    novel_loss: Tensor


@torch.no_grad()
def copying(
    model: nn.Module,
    vocab_size: int,
    distances: Sequence[int],
    words: int = 16,
    sequences: int = 32,
    text: Tensor | None = None,
    seed: int = 0,
) -> Curve:
    """Copy `words` tokens across every distance; the first two of the second copy only say which pattern it is."""
    if words < 3:
        raise ValueError(f"words is {words}; two tokens announce the copy, so at least 3 are needed")
    return _curve(model, vocab_size, distances, words, 2, sequences, text, seed)


@torch.no_grad()
def recalling(
    model: nn.Module,
    vocab_size: int,
    distances: Sequence[int],
    sequences: int = 64,
    text: Tensor | None = None,
    seed: int = 0,
) -> Curve:
    """Name the value of a key seen once, `distance` tokens ago."""
    return _curve(model, vocab_size, distances, 2, 1, sequences, text, seed)


def _curve(model, vocab_size, distances, words, given, sequences, text, seed) -> Curve:
    if not distances or min(distances) < 0:
        raise ValueError(f"distances must be numbers of tokens from 0, got {list(distances)}")
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    rows = []
    for gap in distances:
        pattern = draw(vocab_size, sequences, words, text, generator)
        novel = draw(vocab_size, sequences, words, text, generator)
        filler = draw(vocab_size, sequences, gap, text, generator, contiguous=True)
        rows.append(
            [
                *_second(model, pattern, filler, pattern, given, device),
                _second(model, novel, filler, pattern, given, device)[1],
            ]
        )
    accuracy, loss, novel_loss = torch.tensor(rows, dtype=torch.float64).T
    return Curve(list(distances), accuracy, loss, novel_loss)


def _second(model, first: Tensor, filler: Tensor, second: Tensor, given: int, device) -> tuple[float, float]:
    ids = torch.cat([first, filler, second], dim=1).to(device)
    out = model(ids)
    logits = out.logits if hasattr(out, "logits") else out
    if logits.shape[-1] <= int(ids.max()):
        raise ValueError(
            f"the model answers with {logits.shape[-1]} classes, fewer than its tokens: it names no "
            f"tokens, so "
            f"recall does not apply to it"
        )
    logits = logits[:, ids.shape[1] - second.shape[1] + given - 1 : -1]
    wanted = second[:, given:].to(device)
    loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), wanted.flatten())
    return 100 * (logits.argmax(-1) == wanted).double().mean().item(), loss.item()


def draw(
    vocab_size: int, rows: int, length: int, text: Tensor | None, generator: torch.Generator, contiguous: bool = False
) -> Tensor:
    """Tokens (rows length): pieces of `text` (n) if contiguous, else single tokens of it; uniform ids without text."""
    if text is None:
        return torch.randint(0, vocab_size, (rows, length), generator=generator)
    if contiguous and len(text) <= length:
        raise ValueError(f"a gap of {length} tokens needs a longer text than the {len(text)} tokens given")
    if not contiguous:
        return text.unique()[torch.randint(0, len(text.unique()), (rows, length), generator=generator)]
    start = torch.randint(0, len(text) - length, (rows, 1), generator=generator)
    return text[start + torch.arange(length)]


def probe(subject):
    """Both curves over distances up to what the input allows."""
    from ssmzoo.probes import figures
    from ssmzoo.probes.subject import Finding

    if subject.is_image or subject.vocab_size is None:
        raise ValueError(
            "recall asks for tokens to be named again: it applies to language models, not to image "
            "models or "
            "models of automata"
        )
    longest = subject.inputs.shape[1] if subject.text is None else min(1024, len(subject.text) - 1)
    distances = sorted({d for d in (0, 4, 16, 64, 128, 256, 512, 1024) if d <= longest})
    copy = copying(subject.model, subject.vocab_size, distances, text=subject.text)
    pair = recalling(subject.model, subject.vocab_size, distances, text=subject.text)
    finding = Finding({"longest distance": f"{distances[-1]} tokens"})
    for name, curve in (("copy", copy), ("recall", pair)):
        gain = curve.novel_loss - curve.loss
        finding.summary[f"{name}: accuracy at distance {distances[0]} and {distances[-1]} (%)"] = (
            f"{float(curve.accuracy[0]):.1f}, {float(curve.accuracy[-1]):.1f}"
        )
        ends = f"{float(gain[0]):.2f}, {float(gain[-1]):.2f}"
        finding.summary[f"{name}: gain over a novel pattern (nats per token)"] = ends
        finding.tables[name] = (
            ("distance (tokens)", "accuracy (%)", "loss (nats)", "novel pattern's loss (nats)"),
            [
                (d, f"{a:.2f}", f"{x:.4f}", f"{n:.4f}")
                for d, a, x, n in zip(distances, *(v.tolist() for v in curve[1:]))
            ],
        )
    figure, axes = figures.canvas(1, 2, (4.4, 3.4))
    x = [d + 1 for d in distances]
    figures.lines(
        axes[0, 0],
        x,
        {"copy": copy.accuracy, "recall": pair.accuracy},
        "distance + 1 (tokens)",
        "accuracy (%)",
        "right tokens",
        xscale="log",
        ylim=(-3, 103),
    )
    figures.lines(
        axes[0, 1],
        x,
        {"copy": copy.novel_loss - copy.loss, "recall": pair.novel_loss - pair.loss},
        "distance + 1 (tokens)",
        "loss: novel minus seen (nats)",
        "gained by having seen it",
        xscale="log",
    )
    finding.figures["recall"] = figure
    return finding
