"""Explain a prediction: MambaLRP, gradients and hidden attention side by side, and which of them is true to the model.

The summary says how much of the explained logit MambaLRP's relevances account for, and for every method Delta A: how
much faster the logit falls when the most relevant vectors go first than when the least relevant do.
"""

from __future__ import annotations

import torch

from ssmzoo.probes.entry import enter
from ssmzoo.probes.explain import ATTENTION_METHODS, METHODS, attention_layers, attention_scores, explain
from ssmzoo.probes.faithfulness import deletion
from ssmzoo.probes.mamba_lrp import relevance


def probe(subject):
    """Scores of every method for the first input, and deletion curves over all of them."""
    from ssmzoo.probes import figures
    from ssmzoo.probes.subject import Finding

    entry = enter(subject.model, subject.inputs)
    with torch.no_grad():
        logits = entry.logits(entry.values)
    target = logits.argmax(1) if subject.target is None else torch.full((len(logits),), subject.target)
    if int(target.max()) >= logits.shape[1] or int(target.min()) < 0:
        raise ValueError(f"target {subject.target} is no answer of the model, which has {logits.shape[1]}")
    lrp = relevance(entry.logits, subject.model, entry.values, target)
    finding = Finding({"explained": f"'{subject.answer(int(target[0]))}' (logit {float(lrp.logit[0]):.4g})",
                       "relevances": f"{float(lrp.relevance.sum()):.6g}",
                       "absorbed by biases": f"{float(lrp.absorbed):.6g}",
                       "sum of logits": f"{float(lrp.logit.sum()):.6g}",
                       "conservation error": f"{lrp.conservation_error():.1e}"})
    scores = {}
    try:
        layers = attention_layers(entry, target, layers=subject.layers)
        scores = {m: attention_scores(entry, layers, m) for m in ATTENTION_METHODS}
    except ValueError as error:
        finding.summary["hidden attention"] = str(error)
    scores = {m: scores[m] if m in scores else explain(entry, target, m) for m in METHODS
              if m in scores or m not in ATTENTION_METHODS}
    curves = {m: deletion(entry, s, target) for m, s in scores.items()}
    for method, curve in curves.items():
        finding.summary[f"Delta A, {method}"] = f"{curve.delta:.4g}"
    finding.figures["scores"] = _scores_figure(figures, subject, entry, scores)
    figure, axes = figures.canvas(1, 2, (4.5, 3.4))
    share = [100 * f for f in next(iter(curves.values())).fractions]
    figures.lines(axes[0, 0], share, {m: c.most_first for m, c in curves.items()}, "removed (%)", "explained logit",
                  "most relevant first (lower is better)")
    figures.lines(axes[0, 1], share, {m: c.least_first for m, c in curves.items()}, "removed (%)", "explained logit",
                  "least relevant first (higher is better)")
    finding.figures["deletion"] = figure
    names = list(scores)
    finding.tables["scores"] = (("place", "token", *names), [
        (i, "" if subject.is_image else subject.token(i), *(f"{float(scores[m][0, i]):.6g}" for m in names))
        for i in range(entry.values.shape[1])])
    columns = [f"{m} {k}" for m in names for k in ("most first", "least first")]
    finding.tables["deletion"] = (("removed (%)", *columns), [
        (f, *(f"{float(v[i]):.6g}" for m in names for v in (curves[m].most_first, curves[m].least_first)))
        for i, f in enumerate(share)])
    return finding


def _scores_figure(figures, subject, entry, scores):
    if entry.grid is None:
        labels = [subject.token(i) for i in range(entry.values.shape[1])]
        figure, axes = figures.canvas(len(scores), 1, (max(6, 0.14 * len(labels)), 1.9))
        for axis, (method, s) in zip(axes[:, 0], scores.items()):
            figures.words(axis, labels, s[0], method)
        return figure
    figure, axes = figures.canvas(1, len(scores) + 1, (2.2, 2.4))
    axes[0, 0].imshow(figures.picture(subject.inputs[0]))
    axes[0, 0].set(title="image", xticks=[], yticks=[])
    for axis, (method, s) in zip(axes[0, 1:], scores.items()):
        figures.overlay(axis, subject.inputs[0], entry.map(s)[0], method)
    return figure
