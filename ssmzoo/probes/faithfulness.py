"""Is an explanation true to the model? Remove what it calls relevant and watch; compare maps with segmentations.

    deletion   the k % most relevant (MoRF) or least relevant (LeRF) vectors are set to zero, k = 0 .. 100
    A          mean over the steps of the explained logit;   Delta A = A_LeRF - A_MoRF, higher is better
    perturbation   the same in steps of 10 % with accuracy in place of the logit: positive = MoRF (lower is better),
                   negative = LeRF (higher is better)

Which replacement the papers use is not published; zero vectors and these steps are ours.
Source: Rezaei Jafari et al. (arXiv 2406.07592); Chefer et al. (arXiv 2012.09838); Ali et al. (arXiv 2403.01590).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ssmzoo.probes.entry import Entry

FRACTIONS = tuple(i / 20 for i in range(21))


class Deletion(NamedTuple):
    """fractions (s) removed | most_first, least_first (s) mean explained logit | delta  A_LeRF - A_MoRF"""

    fractions: list[float]
    most_first: Tensor
    least_first: Tensor
    delta: float


def remove(entry: Entry, scores: Tensor, fraction: float, least: bool = False) -> Tensor:
    """The entry's values with the most (or least) relevant fraction set to zero; class tokens and, in a sequence, the
    last token stay. scores (b l)"""
    scores = scores.clone() if least is False else -scores
    fixed = list(entry.special) if entry.grid is not None else [scores.shape[1] - 1]
    scores[:, fixed] = -torch.inf
    count = round(fraction * (scores.shape[1] - len(fixed)))
    if count == 0:
        return entry.values
    away = scores.topk(count, dim=1).indices
    return entry.values.scatter(1, away[..., None].expand(-1, -1, entry.values.shape[-1]), 0.0)


@torch.no_grad()
def deletion(entry: Entry, scores: Tensor, target: Tensor, fractions: Sequence[float] = FRACTIONS) -> Deletion:
    """Logit of `target` (b) while vectors are removed, highest score first and lowest first. scores (b l)"""
    curves = [
        torch.stack(
            [entry.logits(remove(entry, scores, f, least)).gather(1, target[:, None]).mean() for f in fractions]
        )
        for least in (False, True)
    ]
    return Deletion(list(fractions), *curves, (curves[1] - curves[0]).mean().item())


@torch.no_grad()
def perturbation(
    entry: Entry, scores: Tensor, target: Tensor, fractions: Sequence[float] = tuple(i / 10 for i in range(1, 10))
) -> tuple[Tensor, Tensor]:
    """Accuracy (%) for `target` (b), predicted or true classes, after positive and negative perturbation, (s) each."""

    def accuracy(fraction, least):
        return 100 * (entry.logits(remove(entry, scores, fraction, least)).argmax(1) == target).double().mean()

    positive, negative = (torch.stack([accuracy(f, least) for f in fractions]) for least in (False, True))
    return positive, negative


class Segmentation(NamedTuple):
    """In percent, over a set of images: pixel accuracy, mean IoU of foreground and background, mean average precision,
    F1 of the foreground."""

    pixel_accuracy: float
    mean_iou: float
    mean_ap: float
    f1: float


def segmentation(maps: Tensor, truth: Tensor) -> Segmentation:
    """Maps (b y x) cut at their own means against truth (b y x): 1 foreground, 0 background, negative unlabelled."""
    if maps.shape != truth.shape:
        raise ValueError(f"maps have shape {tuple(maps.shape)}, truth {tuple(truth.shape)}; resize the maps first")
    labelled = truth >= 0
    found = (maps > maps.mean((1, 2), keepdim=True)) & labelled
    real = (truth > 0) & labelled
    hit, off = (found & real).sum(), (~found & ~real & labelled).sum()
    unions = (found | real).sum(), labelled.sum() - hit
    precision = []
    for scores, wanted, valid in zip(maps, real, labelled):
        low, high = scores.min(), scores.max()
        scaled = (scores - low) / (high - low).clamp(min=1e-12)
        both = torch.stack([1 - scaled, scaled])[:, valid], torch.stack([~wanted, wanted])[:, valid]
        precision.append(average_precision(both[0].flatten(), both[1].flatten()))
    iou = (hit / unions[0].clamp(min=1) + off / unions[1].clamp(min=1)) / 2
    f1 = 2 * hit / (found.sum() + real.sum()).clamp(min=1)
    values = (hit + off) / labelled.sum().clamp(min=1), iou, sum(precision) / max(1, len(precision)), f1
    return Segmentation(*(100 * float(v) for v in values))


def average_precision(scores: Tensor, wanted: Tensor) -> float:
    """Area under precision over recall, by steps; ties count as one threshold."""
    order = scores.argsort(descending=True)
    scores, hits = scores[order], wanted[order].double()
    last = torch.cat([scores[1:] != scores[:-1], torch.ones(1, dtype=torch.bool)])
    true = hits.cumsum(0)[last]
    precision, recall = true / (torch.arange(len(hits))[last] + 1.0), true / hits.sum().clamp(min=1)
    return float((precision * torch.diff(recall, prepend=recall.new_zeros(1))).sum())


# ---- put together ---------------------------------------------------------------------------------------------------


def area(fractions: Sequence[float], curve: Tensor) -> float:
    """Area under a curve over `fractions`, divided by their range: a mean, in the curve's units."""
    return float(
        torch.trapezoid(curve.double(), torch.tensor(fractions, dtype=torch.float64)) / (fractions[-1] - fractions[0])
    )


def evaluate(finding, subject, entry: Entry, predicted: Tensor, scores: dict[str, Tensor]) -> None:
    """Add to a finding the perturbation test for the predicted (b) and, where known, the true classes, and with masks
    the segmentation test. scores  method -> (b l), or (b m) of the patches"""
    from ssmzoo.probes import figures

    scores = {m: with_special(entry, s) for m, s in scores.items()}
    fractions = [i / 10 for i in range(1, 10)]
    targets = {"predicted": predicted} | ({} if subject.answers is None else {"true": subject.answers})
    rows, curves = [], {}
    for kind, target in targets.items():
        for method, s in scores.items():
            positive, negative = curves[kind, method] = perturbation(entry, s, target, fractions)
            areas = area(fractions, positive), area(fractions, negative)
            rows.append((method, kind, *(f"{v:.2f}" for v in (*areas, *positive.tolist(), *negative.tolist()))))
    steps = [f"{order} {100 * f:.0f} %" for order in ("positive", "negative") for f in fractions]
    finding.tables["perturbation"] = (("method", "class", "positive AUC (%)", "negative AUC (%)", *steps), rows)
    for kind in targets:
        cells = [f"{r[0]} {r[2]} / {r[3]}" for r in rows if r[1] == kind]
        finding.summary[f"perturbation, {kind} class: AUC of accuracy (%), positive / negative"] = "; ".join(cells)
    figure, axes = figures.canvas(1, 2, (4.5, 3.6))
    kind = list(targets)[-1]
    for i, title in enumerate(
        ("positive: most relevant first (lower is better)", "negative: least relevant first (higher is better)")
    ):
        figures.lines(
            axes[0, i],
            [100 * f for f in fractions],
            {m: curves[kind, m][i] for m in scores},
            "removed (%)",
            f"answers that are the {kind} class (%)",
            title,
            ylim=(-3, 103),
        )
    finding.figures["perturbation"] = figure
    if subject.masks is not None and entry.grid is not None:
        size = subject.masks.shape[-2:]
        found = {
            m: segmentation(
                torch.nn.functional.interpolate(entry.map(s)[:, None], size, mode="bilinear")[:, 0], subject.masks
            )
            for m, s in scores.items()
        }
        finding.tables["segmentation"] = (
            ("method", "pixel accuracy (%)", "mIoU (%)", "mAP (%)", "F1 (%)"),
            [(m, *(f"{v:.2f}" for v in values)) for m, values in found.items()],
        )
        for m, v in found.items():
            finding.summary[f"segmentation, {m}: pixel accuracy, mIoU, mAP, F1 (%)"] = ", ".join(f"{x:.1f}" for x in v)


def with_special(entry: Entry, scores: Tensor) -> Tensor:
    """Scores (b m) of the patches -> (b l), class tokens 0."""
    if scores.shape[1] == entry.values.shape[1]:
        return scores
    out = scores.new_zeros(len(scores), entry.values.shape[1])
    out[:, [i for i in range(out.shape[1]) if i not in entry.special]] = scores
    return out
