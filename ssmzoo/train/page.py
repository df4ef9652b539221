"""report.html: what a run folder holds as one page that opens without a network: curves to zoom, pictures, settings.

Everything is read from the folder (report.md, metrics.csv, config.yaml, a manifest), so a page can be written for any
run at any time. Drawing is `page_parts/chart.js`, our own; nothing is fetched.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from ssmzoo.train.logger import read_metrics

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#6B6ECF")
POINTS = 16_000  # of all curves of a page together
PICTURES = 600_000  # bytes of all pictures of a page together
SIDES = (1100, 800, 560)  # pixels of a picture that has to become smaller
MIME = {".png": "image/png", ".jpg": "image/jpeg", ".webp": "image/webp"}


class Report(NamedTuple):
    """report.md by its parts."""

    title: str
    command: str
    rows: dict[str, str]
    texts: dict[str, str]
    figures: list[str]  # paths within the folder


def read_report(text: str) -> Report:
    """The parts of a report.md that `report.write_report` wrote."""
    title = re.match(r"# (.*)", text)
    command = re.search(r"^`(.*)`$", text, re.M)
    rows = dict(re.findall(r"^\| (.+?) \| (.*) \|$", text, re.M))
    texts = dict(re.findall(r"^## (.*)\n\n```\n(.*?)\n```$", text, re.M | re.S))
    figures = re.findall(r"^!\[[^\]]*\]\((.*)\)$", text, re.M)
    return Report(title[1] if title else "run", command[1] if command else "", rows, texts, figures)


def write_run_page(run_dir: Path) -> Path:
    """report.html beside report.md. Raises OSError or ValueError where the folder cannot be read or written."""
    report = read_report((run_dir / "report.md").read_text(encoding="utf-8"))
    config = run_dir / "config.yaml"
    body = [
        f"<h1>{html.escape(report.title)}</h1>",
        f'<p class="command"><code>{html.escape(report.command)}</code></p>',
        "<h2>Results</h2>" + table(report.rows),
        '<h2>Curves</h2><p class="command">drag to zoom, double-click for all</p><div class="charts"></div>',
        pictures(run_dir, [f for f in report.figures if f != "curves.png"]),
        *(f"<h2>{html.escape(name)}</h2><pre>{html.escape(text)}</pre>" for name, text in report.texts.items()),
        environment(run_dir),
        folded("Configuration", config.read_text(encoding="utf-8") if config.exists() else ""),
    ]
    return write(run_dir / "report.html", report.title, body, charts(read_metrics(run_dir / "metrics.csv")))


def charts(rows: Sequence[dict[str, float]]) -> list[dict]:
    """A chart per metric, training and validation laid over each other; the loss first."""
    names = [k for k in dict.fromkeys(k for row in rows for k in row) if k not in ("step", "epoch")]
    groups: dict[str, list[str]] = {}
    for name in names:
        room, _, last = name.partition("/")
        groups.setdefault(last if room in ("train", "val") else name, []).append(name)
    cap = max(50, POINTS // max(1, len(names)))
    made = [
        {
            "title": title.rpartition("/")[2],
            "series": [s for i, n in enumerate(members) if (s := series(rows, n, n, i, cap))],
        }
        for title, members in sorted(groups.items(), key=lambda g: (g[0] != "loss", len(g[1]) < 2))
    ]
    return [chart for chart in made if chart["series"]]


def series(rows: Iterable[dict[str, float]], metric: str, name: str, i: int, cap: int) -> dict | None:
    """A curve of at most `cap` points; of crowded ones the lowest and highest of every stretch stay."""
    points = [(int(r["step"]), r[metric]) for r in rows if math.isfinite(r.get(metric, math.nan))]
    if not points:
        return None
    if len(points) > cap:
        size = -(-len(points) // max(1, cap // 2))
        stretches = [points[k : k + size] for k in range(0, len(points), size)]
        kept = [{min(s, key=lambda p: p[1]), max(s, key=lambda p: p[1])} for s in stretches]
        points = [p for pair in kept for p in sorted(pair)]
    dash = [[], [6, 3], [2, 3]][i // len(COLOURS) % 3]
    x, y = zip(*points)
    return {"name": name, "color": COLOURS[i % len(COLOURS)], "dash": dash, "x": x, "y": [float(f"{v:.5g}") for v in y]}


def table(rows: dict[str, str]) -> str:
    cells = (f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in rows.items() if k.strip(" -"))
    return f"<table>{''.join(cells)}</table>"


def folded(title: str, text: str) -> str:
    return f"<details><summary>{title}</summary><pre>{html.escape(text)}</pre></details>" if text else ""


def environment(run_dir: Path) -> str:
    """Versions, commit and data of the newest checkpoint's manifest."""
    from ssmzoo.checkpoint_files import MANIFEST, read_json

    files = sorted((run_dir / "checkpoints").glob(f"*/{MANIFEST}"))
    if not files:
        return ""
    manifest = read_json(files[-1])
    rows = {k: str(v) for k, v in (manifest.get("versions") or {}).items()}
    rows |= {"git commit": str(manifest.get("git_commit") or manifest.get("git") or "-")}
    rows |= {f"data {k}": str(v) for k, v in (manifest.get("data") or {}).items() if len(str(v)) < 200}
    return f"<h2>Environment</h2>{table(rows)}"


def pictures(run_dir: Path, figures: list[str]) -> str:
    """The pictures inside the page, smaller ones of those that are large; what would not fit is named."""
    shown, left = [], PICTURES
    for name in figures:
        file = run_dir / name
        if not file.is_file() or file.suffix not in MIME:
            continue
        content, kind = shrunk(file, left)
        caption = f"<figcaption>{html.escape(name)}</figcaption>"
        if content is None:
            shown.append(f"<figure>{caption}<p>too large for this page: it lies beside it</p></figure>")
            continue
        left -= len(content)
        source = f"data:{kind};base64,{base64.b64encode(content).decode()}"
        shown.append(f'<figure><img alt="{html.escape(name)}" src="{source}">{caption}</figure>')
    return f'<h2>Pictures</h2><div class="pictures">{"".join(shown)}</div>' if shown else ""


def shrunk(file: Path, room: int) -> tuple[bytes | None, str]:
    """(bytes, kind) of a picture that fits into `room` bytes; (None, "") where it does not, even smaller."""
    content = file.read_bytes()
    if len(content) <= room // 2:
        return content, MIME[file.suffix]
    try:
        from PIL import Image
    except ImportError:
        return (content, MIME[file.suffix]) if len(content) <= room else (None, "")
    with Image.open(file) as picture:
        picture = picture.convert("RGB")
        for side in SIDES:
            picture.thumbnail((side, side))
            out = io.BytesIO()
            picture.save(out, "JPEG", quality=85)
            if out.tell() <= room:
                return out.getvalue(), "image/jpeg"
    return None, ""


def write(path: Path, title: str, body: Iterable[str], data: list[dict]) -> Path:
    """The page, whole or not at all."""
    from ssmzoo.train.checkpoint import write_text

    parts = Path(__file__).parent / "page_parts"
    style, script = ((parts / f).read_text(encoding="utf-8") for f in ("page.css", "chart.js"))
    plain = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    content = "\n".join(body)
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    write_text(
        path,
        f'<!doctype html>\n<html lang="en"><head>{head}<title>{html.escape(title)}</title>\n'
        f"<style>{style}</style></head>\n<body>\n{content}\n"
        f'<script type="application/json" id="data">{plain}</script>\n<script>{script}</script>\n</body></html>\n',
    )
    return path
