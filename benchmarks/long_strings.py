"""SD-SSM on strings of 100,000 symbols, as it stands and from learnt states: python benchmarks/long_strings.py

    python benchmarks/long_strings.py [--cells cycle,d30] [--seeds 0,1,2] [--snap 40] [--runs DIR] [--page-only]

Trains every cell by configs/experiment/regular_languages/<cell>.yaml (a run that DIR holds is taken as it is), then
follows 16 strings twice by `eval.py task.long_snap=40`: with the carried state, and going on from the nearest state of
4,096 strings of 37 to 40 symbols every 40 symbols (ssmzoo/tasks/learnt_states.py). Writes docs/results/long_strings.md
from the .json beside it, in which nothing is measured twice.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
from pathlib import Path

from regular_languages import CELLS, ROOT, trained

PAGE = ROOT / "docs" / "results" / "long_strings.md"
RESULTS = PAGE.with_suffix(".json")


def first_wrong(file: Path) -> tuple[int | None, int]:
    """(position of the first wrong answer or None, symbols read)."""
    with open(file, newline="") as opened:
        last = list(csv.DictReader(opened))[-1]
    return int(last["first_wrong"] or 0) or None, int(last["position"])


def measure(runs: Path, cell: str, seed: int, snap: int) -> dict[str, int | None]:
    folder, _ = trained(runs, "sd_ssm", cell, seed)
    if not (folder / "eval" / "long_snapped.csv").exists():
        words = [f"ckpt={folder}", "data.test_strings=prefixes", "data.test_samples=8", f"task.long_snap={snap}"]
        subprocess.run(
            [sys.executable, "eval.py", *words],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            check=True,
            stdout=subprocess.DEVNULL,
        )
    (plain, symbols), (snapped, _) = (first_wrong(folder / "eval" / f) for f in ("long.csv", "long_snapped.csv"))
    return {"as it stands": plain, "learnt states": snapped, "symbols": symbols, "snap": snap}


def page(known: dict[str, dict[str, dict]]) -> str:
    lines = [
        "# Strings of 100,000 symbols",
        "",
        "Written by `python benchmarks/long_strings.py`. SD-SSM, trained on strings of up to 40 symbols, reads 16",
        "strings of 100,000 with carried state: position of the first wrong answer in any of them, one entry per seed.",
        "*Learnt states*: every 40 symbols the state is replaced by the nearest of those in which 4,096 strings of 37",
        "to 40 symbols end, drawn as in training (`eval.py ckpt=RUN task.long_snap=40`); no label is used. A state",
        "drifts by rounding and by what training left; after 40 symbols it is still nearest to the right learnt state.",
        "",
        "| language | seeds | as it stands | learnt states |",
        "|---|---|---|---|",
    ]

    def told(rows: dict[str, dict], key: str) -> str:
        return "; ".join("none" if rows[s][key] is None else f"{rows[s][key]:,}" for s in sorted(rows))

    for cell in CELLS:
        if rows := known.get(cell):
            seeds = ", ".join(sorted(rows))
            lines.append(f"| {cell} | {seeds} | {told(rows, 'as it stands')} | {told(rows, 'learnt states')} |")
    runs = [row for rows in known.values() for row in rows.values()]
    clean = {key: sum(row[key] is None for row in runs) for key in ("as it stands", "learnt states")}
    lines += ["", f"Without an error: {clean['as it stands']} of {len(runs)} runs as they stand,", ""]
    lines[-2] += f" {clean['learnt states']} of {len(runs)} from learnt states."
    return "\n".join(lines[:-1]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", default=",".join(CELLS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--snap", type=int, default=40)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "regular_languages")
    parser.add_argument("--page-only", action="store_true")
    arguments = parser.parse_args()
    cells = arguments.cells.split(",")
    if unknown := [cell for cell in cells if cell not in CELLS]:
        parser.error(f"unknown cell {unknown[0]}; choose from {', '.join(CELLS)}")
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for seed in () if arguments.page_only else arguments.seeds.split(","):
        for cell in cells:
            if seed in known.get(cell, {}):
                continue
            row = measure(arguments.runs.resolve(), cell, int(seed), arguments.snap)
            known.setdefault(cell, {})[seed] = row
            RESULTS.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
            PAGE.write_text(page(known))
            print(f"{cell}, seed {seed}: {row}", flush=True)
    PAGE.write_text(page(known))


if __name__ == "__main__":
    main()
