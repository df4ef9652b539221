"""`ssmzoo runs [DIR]` and `ssmzoo runs compare A B ...`: a ledger of run folders, and seeds side by side."""

from __future__ import annotations

import argparse
import contextlib
import csv
import shlex
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Run(NamedTuple):
    folder: Path
    config: dict[str, object]  # flat
    status: str
    note: str  # why it failed
    monitor: str
    mode: str  # min or max: which end of the monitored metric is good
    best: float | None
    step: int
    seconds: float


def add_parser(subparsers) -> argparse.ArgumentParser:
    parser = subparsers.add_parser("runs", help="list runs, or compare some of them over seeds")
    parser.add_argument("what", nargs="*", default=["runs"], help="a folder of runs; or: compare RUN RUN ...")
    parser.add_argument("--metric", help="metric to compare, e.g. val/loss (default: the monitored one)")
    parser.add_argument("--out", default="comparison.png", help="picture of the comparison")
    parser.add_argument("--html", type=Path, metavar="FILE", help="one page: a sortable table, curves on each other")
    return parser


def run(args) -> None:
    if args.what[0] == "compare" and args.html is None:
        return compare([read_run(Path(p)) for p in args.what[1:]], args.metric, Path(args.out))
    if args.html is not None:
        return write_page(args.what, args.html)
    if len(args.what) > 1:
        raise ValueError(
            f"runs takes one folder, got {', '.join(args.what)} (to compare runs: `ssmzoo runs compare ...`)"
        )
    root = Path(args.what[0])
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder of runs")
    list_runs(root)


def write_page(what: list[str], out: Path) -> None:
    """`--html`: of the runs below one folder, or of those named behind `compare`."""
    from ssmzoo.train.runs_page import Row, write_runs_page

    if not out.absolute().parent.is_dir():
        raise ValueError(f"--html is {out}: there is no folder {out.parent}")
    folders = [Path(p) for p in (what[1:] if what[0] == "compare" else what)]
    runs, damaged = ([read_run(f) for f in folders], []) if what[0] == "compare" else read_all(folders[0])
    for line in damaged:
        print(f"damaged: {line}")
    if not runs:
        raise ValueError(f"no runs in {folders[0] if folders else 'what was given'}")
    changed = differing_keys(runs)
    rows = [
        Row(r.folder, r.status, r.step, r.seconds, r.monitor, r.best, {k: r.config.get(k) for k in changed})
        for r in runs
    ]
    print(f"{len(rows)} runs in {write_runs_page(rows, out)}")


def read_run(folder: Path) -> Run:
    """A run folder as a row; raises ValueError, naming the file, when it is none or is damaged."""
    from ssmzoo.checkpoint_files import read_index
    from ssmzoo.safe_yaml import read_yaml
    from ssmzoo.train.changes import flatten
    from ssmzoo.train.ledger import read_status
    from ssmzoo.train.logger import read_metrics

    if not (folder / "config.yaml").exists():
        raise ValueError(f"{folder} is not a run folder (no config.yaml)")
    content = read_yaml(folder / "config.yaml")
    if not isinstance(content, dict):
        raise ValueError(f"{folder / 'config.yaml'} does not hold a table of keys")
    with naming(folder / "metrics.csv"):
        rows = read_metrics(folder / "metrics.csv")
        step = int(rows[-1]["step"]) if rows else 0
    status, note = read_status(folder)
    with naming(folder / "checkpoints" / "index.json"):
        index = read_index(folder / "checkpoints") or {}
        best = float(index["best"][0]["value"]) if index.get("best") else None
    last_change = max((f.stat().st_mtime for f in folder.glob("*.csv")), default=0)
    return Run(
        folder,
        flatten(content) | beside_config(folder, index),
        status,
        note,
        str(index.get("monitor", "val/loss")),
        str(index.get("mode", "min")),
        best,
        step,
        max(0.0, last_change - (folder / "config.yaml").stat().st_mtime),
    )


def read_all(root: Path) -> tuple[list[Run], list[str]]:
    """(runs below a folder, what is wrong with those that cannot be read)."""
    runs, damaged = [], []
    for file in sorted(root.rglob("config.yaml")):
        if (file.parent / "metrics.csv").exists() or (file.parent / "status.txt").exists():
            try:
                runs.append(read_run(file.parent))
            except (ValueError, OSError) as error:
                damaged.append(f"{file.parent}: {error}")
    return runs, damaged


@contextlib.contextmanager
def naming(file: Path) -> Iterator[None]:
    """Whatever a damaged file makes its reader raise becomes a ValueError that names it."""
    try:
        yield
    except (ValueError, TypeError, KeyError, OverflowError, OSError, csv.Error) as error:
        text = f"{error!r}" if isinstance(error, KeyError) else str(error)
        raise ValueError(text if str(file) in text else f"{file} cannot be read: {text}") from None


def beside_config(folder: Path, index: dict) -> dict[str, str]:
    """What makes runs of one configuration differ: changes typed at a resume, and another content of the data."""
    from ssmzoo.checkpoint_files import MANIFEST, read_json
    from ssmzoo.train.changes import HISTORY, history

    with naming(folder / HISTORY):
        found = {"resumed": changed} if (changed := history(folder)) else {}
    name = index["best"][0]["name"] if index.get("best") else index.get("last")
    manifest = folder / "checkpoints" / str(name) / MANIFEST
    if manifest.exists():
        data = read_json(manifest).get("data") or {}
        content = [v for k, v in data.items() if k.endswith(("fingerprint", "sha256"))]
        found |= {"data.content": str(content[0])[:8]} if content else {}
    return found


def list_runs(root: Path) -> None:
    from ssmzoo.train.progress import clock

    runs, damaged = read_all(root)
    if not runs and not damaged:
        print(f"no runs in {root}")
        return
    models: dict[object, list[Run]] = {}
    for r in runs:
        models.setdefault(r.config.get("model_name"), []).append(r)
    differing = {name: differing_keys(members) for name, members in models.items()}
    width = max((len(str(r.folder)) for r in runs), default=3)
    print(f"{'run':<{width}}  {'status':<9}{'steps':>7}{'time':>9}  best")
    for r in runs:
        best = f"{r.monitor} {r.best:.4f}" if r.best is not None else "-"
        print(f"{r.folder!s:<{width}}  {r.status:<9}{r.step:>7}{clock(r.seconds):>9}  {best}")
        changed = ", ".join(f"{k}={r.config.get(k)}" for k in differing[r.config.get("model_name")])
        if changed:
            print(f"    {changed}")
        if r.status == "failed" and r.note:
            print(f"    {r.note}")
        if r.status not in ("finished", "running"):
            print(f"    python train.py resume={shlex.quote(str(r.folder))}")
    for line in damaged:
        print(f"damaged: {line}")


def differing_keys(runs: list[Run]) -> list[str]:
    """Configuration keys whose values are not the same in all runs (names and folders left out)."""
    keys = sorted({k for r in runs for k in r.config} - {"name", "runs_dir", "resume", "config"})
    return [k for k in keys if len({repr(r.config.get(k)) for r in runs}) > 1]


def not_seeds(keys: list[str], runs: list[Run]) -> list[str]:
    """Without `seed`, and without seeds that every run took from it (data.seed)."""
    taken = {
        k for k in keys if k.rpartition(".")[2] == "seed" and all(r.config.get(k) == r.config.get("seed") for r in runs)
    }
    return [k for k in keys if k not in taken]


def label(run: Run, varied: list[str], per_model: dict[object, list[str]]) -> str:
    """What a run does otherwise than the others, but for its seed.

    Of runs of several models: the model, the keys outside `model` that differ and exist in both (learning rates among
    them, which models bring along), and the arguments in which the runs of this model differ.
    """
    name = run.config.get("model_name")
    shown = [k for k in varied if k != "model_name" and not k.startswith("model.")]
    shown += [k for k in per_model[name] if k.startswith("model.")]
    head = [str(name)] if "model_name" in varied else []
    return ", ".join([*head, *(f"{k}={run.config[k]}" for k in shown if k in run.config)]) or "all"


def compare(runs: list[Run], metric: str | None, png: Path) -> None:
    """Mean and standard deviation over seeds per configuration, and their curves with bands.

    Only `seed` is pooled: every other key that varies is part of the label.
    """
    if len(runs) < 2:
        raise ValueError("runs compare needs at least two run folders")
    if not png.absolute().parent.is_dir():
        raise ValueError(f"--out is {png}: there is no folder {png.parent}")
    from ssmzoo.tasks.metrics.recall import draw_memory, memory_point
    from ssmzoo.train.logger import read_metrics

    metric = metric or runs[0].monitor
    good = max if metric == runs[0].monitor and runs[0].mode == "max" else min
    varied = not_seeds(differing_keys(runs), runs)
    members: dict[object, list[Run]] = {}
    for r in runs:
        members.setdefault(r.config.get("model_name"), []).append(r)
    per_model = {name: not_seeds(differing_keys(of_one), of_one) for name, of_one in members.items()}
    groups: dict[str, list[dict[int, float]]] = {}
    memory: dict[str, list[tuple[float, float]]] = {}
    cache: dict[str, list[tuple[float, float]]] = {}  # of language models: bytes of state and loss
    for r in runs:
        curve = {int(row["step"]): row[metric] for row in read_metrics(r.folder / "metrics.csv") if metric in row}
        if not curve:
            raise ValueError(f"{r.folder} has no {metric} in metrics.csv")
        groups.setdefault(label(r, varied, per_model), []).append(curve)
        if point := memory_point(r.folder / "recall.csv"):
            memory.setdefault(label(r, varied, per_model), []).append(point)
        if point := cache_point(r.folder / "state.csv"):
            cache.setdefault(label(r, varied, per_model), []).append(point)
    column = max(18, len(metric) + 9)
    width = max(40, *(len(name) + 2 for name in groups))
    print(f"{'configuration':<{width}}{'runs':>5}{'final ' + metric:>{column}}{'sd':>10}{'best':>10}{'at step':>9}")
    for name, curves in groups.items():
        finals, last = [c[max(c)] for c in curves], sorted({max(c) for c in curves})
        best = good(good(c.values()) for c in curves)
        shown = f"{statistics.stdev(finals):.4f}" if len(finals) > 1 else "-"
        steps = f"{last[0]}" if len(last) == 1 else f"{last[0]}-{last[-1]}"
        mean = statistics.mean(finals)
        print(f"{name:<{width}}{len(curves):>5}{mean:>{column}.4f}{shown:>10}{best:>10.4f}{steps:>9}")
    for line in doubts(runs, varied, per_model):
        print(f"warning: {line}")
    draw(groups, metric, png)
    print(f"curves in {png}")
    if len(memory) > 1:
        print(f"accuracy against bytes of state in {draw_memory(memory, png.with_stem(png.stem + '_memory'))}")
    if len(cache) > 1:
        print("\n" + cache_table(cache))
        print(f"loss against bytes of state in {draw_memory(cache, png.with_stem(png.stem + '_state'), 'loss')}")


def doubts(runs: list[Run], varied: list[str], per_model: dict[object, list[str]]) -> list[str]:
    """What a mean over seeds hides: a seed that comes twice, runs that did not come to their end."""
    seen: dict[tuple, Path] = {}
    found = []
    for r in runs:
        key = (label(r, varied, per_model), r.config.get("seed"))
        if key in seen:
            found.append(f"{r.folder} and {seen[key]} are the same configuration with the same seed")
        seen.setdefault(key, r.folder)
        if r.status in ("killed", "stopped", "failed", "running"):
            found.append(f"{r.folder} is {r.status}: its last value is of step {r.step}")
    return found


def cache_point(state_csv: Path) -> tuple[float, float] | None:
    """(bytes of state at the trained length, validation loss) of a language model's run; None where unknown."""
    if not state_csv.exists():
        return None
    with state_csv.open(newline="", encoding="utf-8") as file:
        row = next(csv.DictReader(file), None)
    try:
        held, loss = float(row["state_bytes"]), float(row["loss"])
    except (TypeError, KeyError, ValueError):
        raise ValueError(f"{state_csv} does not hold state_bytes and loss") from None
    return (held, loss) if held else None


def cache_table(points: dict[str, list[tuple[float, float]]]) -> str:
    """Configurations by bytes of state; a star where none with as little state or less has a lower loss."""
    means = {name: tuple(map(statistics.mean, zip(*runs))) for name, runs in points.items()}
    width = max(40, *(len(name) + 2 for name in means))
    lines = [f"{'configuration':<{width}}{'bytes of state':>16}{'loss':>10}"]
    for name, (held, loss) in sorted(means.items(), key=lambda item: item[1]):
        beaten = any(h <= held and other < loss for h, other in means.values())
        lines.append(f"{name:<{width}}{held:>16,.0f}{loss:>10.4f}{'' if beaten else ' *'}")
    return "\n".join([*lines, "* the lowest loss of all with as little state or less"])


def draw(groups: dict[str, list[dict[int, float]]], metric: str, png: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from ssmzoo.tasks.metrics.recall import draw_legend
    from ssmzoo.terminal import caption
    from ssmzoo.train.report import COLOURS, STYLES

    figure, axes = plt.subplots(figsize=(7, 4), constrained_layout=True)
    for i, (name, curves) in enumerate(groups.items()):
        steps = sorted(set.intersection(*(set(c) for c in curves)))
        means = [statistics.mean(c[s] for c in curves) for s in steps]
        colour = COLOURS[i % len(COLOURS)]
        axes.plot(
            steps, means, color=colour, linestyle=STYLES[i % len(STYLES)], label=caption(f"{name} ({len(curves)})")
        )
        if len(curves) > 1:
            spread = [statistics.stdev(c[s] for c in curves) for s in steps]
            axes.fill_between(
                steps,
                [m - d for m, d in zip(means, spread)],
                [m + d for m, d in zip(means, spread)],
                color=colour,
                alpha=0.2,
                linewidth=0,
            )
    axes.set(xlabel="optimiser step", ylabel=metric, title="means over seeds, bands: one standard deviation")
    axes.grid(alpha=0.3)
    draw_legend(figure, axes)
    figure.savefig(png, dpi=120)
    plt.close(figure)
