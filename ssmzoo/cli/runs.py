"""`ssmzoo runs [DIR]` and `ssmzoo runs compare A B ...`: a ledger of run folders, and seeds side by side."""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
from pathlib import Path
from typing import NamedTuple

from ssmzoo.cli.ckpt import flatten


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
    return parser


def run(args) -> None:
    if args.what[0] == "compare":
        return compare([read_run(Path(p)) for p in args.what[1:]], args.metric, Path(args.out))
    root = Path(args.what[0])
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder of runs")
    list_runs(root)


def read_run(folder: Path) -> Run:
    """A run folder as a row; raises ValueError when it is none."""
    from omegaconf import OmegaConf

    from ssmzoo.train.ledger import read_status
    from ssmzoo.train.logger import read_metrics

    if not (folder / "config.yaml").exists():
        raise ValueError(f"{folder} is not a run folder (no config.yaml)")
    config = flatten(OmegaConf.to_container(OmegaConf.load(folder / "config.yaml")))
    rows = read_metrics(folder / "metrics.csv")
    status, note = read_status(folder)
    index_file = folder / "checkpoints" / "index.json"
    index = json.loads(index_file.read_text()) if index_file.exists() else {}
    best = index["best"][0]["value"] if index.get("best") else None
    last_change = max((f.stat().st_mtime for f in folder.glob("*.csv")), default=0)
    return Run(
        folder,
        config,
        status,
        note,
        index.get("monitor", "val/loss"),
        index.get("mode", "min"),
        best,
        int(rows[-1]["step"]) + 1 if rows else 0,
        max(0.0, last_change - (folder / "config.yaml").stat().st_mtime),
    )


def list_runs(root: Path) -> None:
    from ssmzoo.train.progress import clock

    folders = [f.parent for f in sorted(root.rglob("config.yaml"))]
    runs = [read_run(f) for f in folders if (f / "metrics.csv").exists() or (f / "status.txt").exists()]
    if not runs:
        print(f"no runs in {root}")
        return
    models = {r.config.get("model_name"): [] for r in runs}
    for r in runs:
        models[r.config.get("model_name")].append(r)
    differing = {name: differing_keys(members) for name, members in models.items()}
    width = max(len(str(r.folder)) for r in runs)
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


def differing_keys(runs: list[Run]) -> list[str]:
    """Configuration keys whose values are not the same in all runs (names and folders left out)."""
    keys = sorted({k for r in runs for k in r.config} - {"name", "runs_dir", "resume"})
    return [k for k in keys if len({repr(r.config.get(k)) for r in runs}) > 1]


def compare(runs: list[Run], metric: str | None, png: Path) -> None:
    """Mean and standard deviation over seeds per configuration, and their curves with bands."""
    if len(runs) < 2:
        raise ValueError("runs compare needs at least two run folders")
    from ssmzoo.train.logger import read_metrics

    metric = metric or runs[0].monitor
    good = max if metric == runs[0].monitor and runs[0].mode == "max" else min
    varied = [k for k in differing_keys(runs) if k != "seed" and not k.endswith(".seed")]
    groups: dict[str, list[dict[int, float]]] = {}
    for r in runs:
        curve = {int(row["step"]) + 1: row[metric] for row in read_metrics(r.folder / "metrics.csv") if metric in row}
        if not curve:
            raise ValueError(f"{r.folder} has no {metric} in metrics.csv")
        same_model = "model_name" not in varied
        label = ", ".join(f"{k}={r.config.get(k)}" for k in varied) if same_model else str(r.config["model_name"])
        groups.setdefault(label or "all", []).append(curve)
    column = max(18, len(metric) + 9)
    width = max(40, *(len(name) + 2 for name in groups))
    print(f"{'configuration':<{width}}{'runs':>5}{'final ' + metric:>{column}}{'sd':>10}{'best':>10}")
    for name, curves in groups.items():
        finals = [c[max(c)] for c in curves]
        sd = statistics.stdev(finals) if len(finals) > 1 else 0.0
        best = good(good(c.values()) for c in curves)
        shown = f"{sd:.4f}" if len(finals) > 1 else "-"
        print(f"{name:<{width}}{len(curves):>5}{statistics.mean(finals):>{column}.4f}{shown:>10}{best:>10.4f}")
    draw(groups, metric, png)
    print(f"curves in {png}")


def draw(groups: dict[str, list[dict[int, float]]], metric: str, png: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from ssmzoo.train.report import COLOURS, STYLES

    figure, axes = plt.subplots(figsize=(7, 4), constrained_layout=True)
    for i, (name, curves) in enumerate(groups.items()):
        steps = sorted(set.intersection(*(set(c) for c in curves)))
        means = [statistics.mean(c[s] for c in curves) for s in steps]
        colour = COLOURS[i % len(COLOURS)]
        axes.plot(steps, means, color=colour, linestyle=STYLES[i % len(STYLES)], label=f"{name} ({len(curves)})")
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
    axes.set(xlabel="optimiser step", ylabel=metric, title="mean over seeds, band: one standard deviation")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(png, dpi=120)
    plt.close(figure)
