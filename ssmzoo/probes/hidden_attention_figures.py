"""Figures and tables of the probe `hidden_attention`."""

from __future__ import annotations

from torch import Tensor

from ssmzoo.probes import figures
from ssmzoo.probes.attention_matrices import attention
from ssmzoo.probes.attribution_maps import min_max
from ssmzoo.probes.entry import enter
from ssmzoo.probes.explain import ATTENTION_METHODS, attention_layers, attention_scores, class_row_scores
from ssmzoo.probes.faithfulness import evaluate, with_special
from ssmzoo.probes.relevance import explained, scores_figure
from ssmzoo.probes.scan import Scan
from ssmzoo.probes.softmax_attention import Attention


def shown_channels(scan: Scan | Attention, channels) -> list[int]:
    """The channels asked for (of attention, the heads that have one), or one of the first and one of a later
    direction."""
    if isinstance(scan, Attention):
        width = scan.v.shape[-1]
        return sorted({c // width for c in channels}) if channels is not None else list(range(min(2, scan.total)))
    if channels is not None:
        return list(channels)
    return [0, scan.total // 2] if scan.directions > 1 else list(range(min(2, scan.total)))


def token_maps(finding, maps: dict[str, Tensor]) -> None:
    """Token maps (l l) by layer, and the weights with which the last token reads."""
    columns = min(4, len(maps))
    figure, axes = figures.canvas(-(-len(maps) // columns), columns)
    for axis, (key, m) in zip(axes.flat, maps.items()):
        figures.heat(figure, axis, m, "token read", "token reading", key, label="weight")
    for axis in list(axes.flat)[len(maps) :]:
        axis.set_axis_off()
    finding.figures["token_maps"] = figure
    rows = [(key, len(m) - 1, j, f"{float(w):.6g}") for key, m in maps.items() for j, w in enumerate(m[-1])]
    finding.tables["last_row"] = (("layer", "reader", "read", "weight"), rows)


def rows_of_channels(finding, reads, subject) -> None:
    """Only the rows asked for, in memory linear in the length."""
    shown, rows = reads[:4], []
    for key, scan, weights in reads:
        for c, channel in enumerate(scan.channels.tolist()):
            rows += [
                (key, channel, p, j, f"{float(w):.6g}")
                for i, p in enumerate(subject.positions)
                for j, w in enumerate(weights[c, i])
                if w != 0
            ]
    finding.tables["rows"] = (("layer", "channel", "reading step", "step read", "alpha"), rows)
    finding.summary["rows of alpha"] = f"{len(rows):,} weights of steps {', '.join(map(str, subject.positions))}"
    figure, axes = figures.canvas(len(shown), 1, (6, 2.6))
    for axis, (key, scan, weights) in zip(axes[:, 0], shown):
        curves = {
            f"{scan.unit} {int(scan.channels[c])}, step {p}": weights[c, i].abs()
            for c in range(len(weights))
            for i, p in enumerate(subject.positions)
        }
        figures.lines(axis, range(scan.length), dict(list(curves.items())[:7]), "step read", "|alpha|", key)
    finding.figures["rows"] = figure


def explanations(finding, subject) -> None:
    """Raw attention, rollout and attribution for all inputs, shown for the first, and how true they are."""
    try:
        entry = enter(subject.model, subject.inputs)
        target = explained(subject, entry)
        layers = attention_layers(entry, target, 64, subject.layers, subject.channels, subject.max_bytes)
    except ValueError as error:
        if "max_bytes" in str(error) or "target" in str(error):
            raise
        finding.summary["explanation maps"] = str(error)
        return
    scores = {m: attention_scores(entry, layers, m) for m in ATTENTION_METHODS} | class_row_scores(entry, layers)
    scores = {m: with_special(entry, s.detach()) for m, s in scores.items()}
    finding.summary["explained"] = f"'{subject.answer(int(target[0]))}'"
    finding.figures["explanations"] = scores_figure(subject, entry, scores)
    finding.tables["explanations"] = (
        ("position", "token", *scores),
        [
            (i, "" if subject.is_image else subject.token(i), *(f"{float(s[0, i]):.6g}" for s in scores.values()))
            for i in range(entry.values.shape[1])
        ],
    )
    evaluate(finding, subject, entry, target, scores)


def channels(scans: list[Scan | Attention], subject):
    shown = scans[: min(4, len(scans))]
    figure, axes = figures.canvas(len(shown), 4)
    for row, scan in zip(axes, shown):
        every = dict.fromkeys(i * scan.total // 4 for i in range(4))
        picked = (list(every) if subject.channels is None else shown_channels(scan, subject.channels))[:4]
        matrices = attention(scan.take(picked), True, subject.max_bytes)[0]
        for axis, channel, matrix in zip(row, picked, matrices):
            figures.heat(
                figure,
                axis,
                min_max(matrix.abs()),
                "token read",
                "token reading",
                f"{scan.name}, {scan.unit} {channel}",
                label="|alpha|, min-max",
            )
        for axis in row[len(picked) :]:
            axis.set_axis_off()
    return figure
