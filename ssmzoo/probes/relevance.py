"""Explain a prediction: MambaLRP, gradients and hidden attention side by side, and which of them is true to the model.

The summary says how much of the explained logit MambaLRP's relevances account for, and for every method Delta A: how
much faster the logit falls when the most relevant vectors go first than when the least relevant do.
"""

from __future__ import annotations

import torch

from ssmzoo.probes.entry import enter
from ssmzoo.probes.explain import ATTENTION_METHODS, METHODS, attention_layers, attention_scores, explain
from ssmzoo.probes.faithfulness import deletion, evaluate
from ssmzoo.probes.mamba_lrp import relevance


def probe(subject):
    """Scores of every method for the first input, and deletion curves over all of them."""
    from ssmzoo.probes import figures
    from ssmzoo.probes.subject import Finding

    entry = enter(subject.model, subject.inputs)
    target = explained(subject, entry)
    lrp = relevance(entry.logits, subject.model, entry.values, target)
    finding = Finding(
        {
            "explained": f"'{subject.answer(int(target[0]))}' (logit {float(lrp.logit[0]):.4g})",
            "relevances": f"{float(lrp.relevance.sum()):.6g}",
            "absorbed by biases": f"{float(lrp.absorbed):.6g}",
            "sum of logits": f"{float(lrp.logit.sum()):.6g}",
            "conservation error": f"{lrp.conservation_error():.1e}",
        }
    )
    scores = {}
    try:
        layers = attention_layers(entry, target, 64, subject.layers, subject.channels, subject.max_bytes)
        scores = {m: attention_scores(entry, layers, m) for m in ATTENTION_METHODS}
    except ValueError as error:
        if "max_bytes" in str(error) or "do not exist" in str(error) or "numbered from" in str(error):
            raise
        finding.summary["hidden attention"] = str(error)
    scores = {
        m: scores[m] if m in scores else explain(entry, target, m)
        for m in METHODS
        if m in scores or m not in ATTENTION_METHODS
    }
    curves = {m: deletion(entry, s, target) for m, s in scores.items()}
    for method, curve in curves.items():
        finding.summary[f"Delta A, {method}"] = f"{curve.delta:.4g}"
    finding.figures["scores"] = scores_figure(subject, entry, scores)
    figure, axes = figures.canvas(1, 2, (4.5, 3.4))
    share = [100 * f for f in next(iter(curves.values())).fractions]
    figures.lines(
        axes[0, 0],
        share,
        {m: c.most_first for m, c in curves.items()},
        "removed (%)",
        "explained logit",
        "most relevant first (lower is better)",
    )
    figures.lines(
        axes[0, 1],
        share,
        {m: c.least_first for m, c in curves.items()},
        "removed (%)",
        "explained logit",
        "least relevant first (higher is better)",
    )
    finding.figures["deletion"] = figure
    names = list(scores)
    finding.tables["scores"] = (
        ("position", "token", *names),
        [
            (i, "" if subject.is_image else subject.token(i), *(f"{float(scores[m][0, i]):.6g}" for m in names))
            for i in range(entry.values.shape[1])
        ],
    )
    columns = [f"{m} {k}" for m in names for k in ("most first", "least first")]
    finding.tables["deletion"] = (
        ("removed (%)", *columns),
        [
            (f, *(f"{float(v[i]):.6g}" for m in names for v in (curves[m].most_first, curves[m].least_first)))
            for i, f in enumerate(share)
        ],
    )
    evaluate(finding, subject, entry, target, scores)
    return finding


@torch.no_grad()
def explained(subject, entry) -> torch.Tensor:
    """(b) the answer that is explained: the one asked for, or the model's first choice."""
    logits = entry.logits(entry.values)
    if subject.target is None:
        return logits.argmax(1)
    if not 0 <= subject.target < logits.shape[1]:
        raise ValueError(
            f"target {subject.target} is no answer of the model, which has {logits.shape[1]}, numbered from 0"
        )
    return torch.full((len(logits),), subject.target)


def scores_figure(subject, entry, scores):
    """The first input with its scores by every method: bars below tokens, or maps over the image."""
    from ssmzoo.probes import figures

    if entry.grid is None:
        labels = [subject.token(i) for i in range(entry.values.shape[1])]
        figure, axes = figures.canvas(len(scores), 1, (max(6, 0.14 * len(labels)), 1.9))
        for axis, (method, s) in zip(axes[:, 0], scores.items()):
            figures.words(axis, labels, s[0], method)
        return figure
    columns = min(4, len(scores) + 1)
    figure, axes = figures.canvas(-(-(len(scores) + 1) // columns), columns, (3.2, 2.7))
    axes[0, 0].imshow(figures.picture(subject.inputs[0]), extent=(0, 1, 1, 0))
    axes[0, 0].set(
        title="image", xlabel="x (share of width)", ylabel="y (share of height)", xticks=[0, 1], yticks=[0, 1]
    )
    for axis, (method, s) in zip(list(axes.flat)[1:], scores.items()):
        figures.overlay(figure, axis, subject.inputs[0], entry.map(s)[0], method)
    for axis in list(axes.flat)[len(scores) + 1 :]:
        axis.set_axis_off()
    return figure
