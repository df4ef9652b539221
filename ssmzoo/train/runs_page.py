"""One page for many runs: a table that sorts by every column, and their curves laid over each other."""

from __future__ import annotations

import html
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ssmzoo.train.logger import read_metrics
from ssmzoo.train.page import POINTS, series, write
from ssmzoo.train.progress import clock

MOST = 60  # runs whose curves are drawn: more are a tangle, and the page would grow


class Row(NamedTuple):
    folder: Path
    status: str
    step: int
    seconds: float
    monitor: str
    best: float | None
    changed: dict[str, object]  # keys of the configuration in which the runs differ


def write_runs_page(rows: Sequence[Row], out: Path) -> Path:
    """The page. Raises OSError where `out` cannot be written."""
    drawn = rows[:MOST]
    metrics = [read_metrics(r.folder / "metrics.csv") for r in drawn]
    names = sorted({k for m in metrics for row in m for k in row} - {"step", "epoch"}, key=order)
    cap = max(40, POINTS // max(1, len(drawn) * len(names)) * 4)
    charts = []
    for name in names:
        curves = (series(m, name, label(r), i, cap) for i, (r, m) in enumerate(zip(drawn, metrics)))
        if found := [c for c in curves if c]:
            charts.append({"title": name, "series": found})
    options = "".join(f"<option>{html.escape(c['title'])}</option>" for c in charts)
    note = f" (of the first {MOST} runs)" if len(rows) > MOST else ""
    body = [
        f"<h1>{len(rows)} runs</h1>",
        '<p class="command">click a column to sort, a run in the legend to hide it; drag in the curves to zoom</p>',
        f'<h2>Curves{note}</h2><p><select id="metric">{options}</select></p><div class="charts"></div>',
        f'<h2>Runs</h2><div class="wide">{table(rows, out.absolute().parent)}</div>',
    ]
    return write(out, f"{len(rows)} runs", body, charts)


def order(name: str) -> tuple[bool, bool, str]:
    """The validation loss first, then what else is validated."""
    return name != "val/loss", not name.startswith("val/"), name


def label(row: Row) -> str:
    return "/".join(row.folder.parts[-2:])


def table(rows: Sequence[Row], home: Path) -> str:
    keys = [k for k in dict.fromkeys(k for r in rows for k in r.changed) if k != "name"]
    heads = ["run", "status", "steps", "time", "best", "of", *keys]
    lines = []
    for r in rows:
        page = r.folder / "report.html"
        name = html.escape(label(r))
        link = (
            f'<a href="{html.escape(Path(os.path.relpath(page, home)).as_posix())}">{name}</a>'
            if page.exists()
            else name
        )
        best = "" if r.best is None else f"{r.best:.6g}"
        cells = [
            cell(link, label(r)),
            cell(r.status),
            number(r.step, f"{r.step:,}"),
            number(r.seconds, clock(r.seconds)),
        ]
        cells += [number(best, best), cell(html.escape(r.monitor))]
        cells += [cell(html.escape(value(k, r.changed.get(k)))) for k in keys]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    top = "".join(f'<th data-key="{html.escape(h)}">{html.escape(h)}</th>' for h in heads)
    return f'<table class="sortable"><thead><tr>{top}</tr></thead><tbody>{"".join(lines)}</tbody></table>'


def value(key: str, setting: object) -> str:
    """A setting as it is shown: of a class its name alone."""
    shown = "" if setting is None else str(setting)
    return shown.rpartition(".")[2] if key.endswith("_target_") else shown


def cell(content: str, value: str | None = None) -> str:
    return f"<td>{content}</td>" if value is None else f'<td data-value="{html.escape(value)}">{content}</td>'


def number(value: object, shown: str) -> str:
    return f'<td class="number" data-value="{value}">{shown}</td>'
