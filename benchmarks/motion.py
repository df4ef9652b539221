"""Fill docs/results/motion.md: MambaTalk with its scans beside its transformer twin, on generated motion.

    python benchmarks/motion.py --budget 20             what is missing, for so many minutes; then the page
    python benchmarks/motion.py --seeds 0
    python benchmarks/motion.py --page-only

A run is train.py in a process of its own, on one thread. The code books of a seed are trained once (300 steps) for both
arms. What is done is one line of results.jsonl under --runs and is not
repeated, nor is what stands in docs/results/motion.json, their summary.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from pathlib import Path

from claim_runs import fill, rows_of, train_once

ROOT = Path(__file__).resolve().parent.parent
SUMMARY = ROOT / "docs/results/motion.json"
SEEDS = (0, 1, 2)
CODES = "code books"  # what every arm of a seed starts from
ARMS = {"MambaTalk": (), "transformer twin": ("model.mixer=attention",)}
COLUMNS = {
    "code_accuracy": "codes named right, %",
    "beat_consistency": "beat consistency",
    "beat_consistency_of_others": "with another clip's beats",
    "diversity": "diversity, m",
    "frechet": "Frechet",
    "face_mse": "face MSE",
    "face_lvd": "face LVD",
}
TRUTH = ("beat_consistency_of_truth", "diversity_of_truth")


def found(folder: Path) -> dict:
    from ssmzoo.train.logger import read_metrics
    from ssmzoo.zoo import load_model

    if not (folder / "measures.csv").exists():  # code books
        return {}
    rows = [r for r in read_metrics(folder / "metrics.csv") if "val/loss" in r]
    best = min(rows, key=lambda r: r["val/loss"])
    with open(folder / "measures.csv", newline="") as file:
        measures = {k: float(v) for k, v in next(csv.DictReader(file)).items()}
    talk = load_model(folder)[0].talk
    return {"code_accuracy": 100 * best["val/code_accuracy"], "step": int(best["step"]), **measures} | {
        "parameters": sum(p.numel() for p in talk.parameters())
    }


def train(arm: str, seed: int, runs: Path) -> dict | None:
    books = runs / "motion_codes" / f"{CODES.replace(' ', '_')}-{seed}"
    model = ["model=motion_codes"] if arm == CODES else ["model=mambatalk", f"init_from={books}", *ARMS[arm]]
    words = [*model, f"seed={seed}", "trainer.accelerator=cpu", "callbacks.watchdog=null"]
    return train_once(words, runs, f"{arm.replace(' ', '_')}-{seed}", found)


def spread(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.3g} (one seed)"
    return f"{statistics.mean(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def write_page(rows: list[dict]) -> None:
    lines = [
        "# Motion from speech: scans beside a transformer twin",
        "",
        "`python benchmarks/motion.py`, one thread a run. The default run of `model=mambatalk` (200 steps of 8",
        "windows) on code books of 300 steps that both arms of a seed share. The twin (`model.mixer=attention`) has",
        "causal attention with rotary positions where the scans are, and the rest as it is. The motion is generated",
        "from the beats of a synthesised sound: no number can be compared with a published one. Mean and range over",
        "seeds.",
        "",
        "| arm | " + " | ".join(COLUMNS.values()) + " | parameters | CPU seconds | seeds |",
        "|" + "---|" * (len(COLUMNS) + 4),
    ]
    kept = {arm: [r for r in rows if r["arm"] == arm] for arm in ARMS}
    for arm, runs in kept.items():
        if runs:
            cells = [spread([r[key] for r in runs]) for key in COLUMNS]
            seconds = statistics.mean(r["cpu_seconds"] for r in runs)
            lines.append(
                f"| {arm} | " + " | ".join(cells) + f" | {runs[0]['parameters']:,} | {seconds:.0f} | {len(runs)} |"
            )
    if truth := kept["MambaTalk"]:
        consistency, diversity = (spread([r[key] for r in truth]) for key in TRUTH)
        lines += ["", f"The true motion's beat consistency is {consistency}, its diversity {diversity} m."]
    SUMMARY.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)))
    parser.add_argument("--budget", type=float, default=float("inf"), help="minutes; no run starts after them")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "claims_motion")
    parser.add_argument("--page-only", action="store_true", help="from docs/results/motion.json")
    arguments = parser.parse_args()
    if not arguments.page_only:
        keys = [(arm, seed) for seed in map(int, arguments.seeds.split(",")) for arm in (CODES, *ARMS)]
        fill(SUMMARY, arguments.runs.resolve(), keys, train, arguments.budget)
    write_page(rows_of(SUMMARY))
    print(f"written: {SUMMARY.with_suffix('.md')}")


if __name__ == "__main__":
    main()
