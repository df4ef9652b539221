"""Runs of train.py in processes of their own, and what benchmarks/{graphs,motion,series,ssmi}.py keep of them.

A claim's summary is a list in docs/results/<claim>.json. What is done is a line of results.jsonl in the runs' folder as
well, so that a benchmark that was stopped goes on.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from recall import import_everything, load, note, train_here


def forked(work: Callable[[], dict], result: Path) -> tuple[int, float, int]:
    """Run `work` in a fork, which writes `result`: (status, CPU seconds, largest resident bytes)."""
    child = os.fork()
    if child == 0:
        try:
            result.write_text(json.dumps(work()))
            os._exit(0)
        except BaseException as error:  # a fork must not go on as its parent would
            print(f"{type(error).__name__}: {error}", flush=True)
            os._exit(1)
    _, status, used = os.wait4(child, 0)
    return status, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024


def train_once(
    words: list[str], runs: Path, name: str, found: Callable[[Path], dict], after: Callable[[Path], None] | None = None
) -> dict | None:
    """What `found` reads in the folder of a run made anew, and "cpu_seconds"; None when it failed, which is printed.

    after   of the run's folder, when it has ended well
    """
    log = runs / f"{name}.log"
    for left in runs.glob(f"*/{name}"):
        shutil.rmtree(left)

    def folder() -> Path:
        return next(runs.glob(f"*/{name}"))

    def work() -> dict:
        if train_here([*words, f"name={name}", f"runs_dir={runs}"], log, lambda: found(folder())):
            raise RuntimeError(f"see {log}")
        if after is not None:
            after(folder())
        return json.loads(log.with_suffix(".json").read_text())

    status, seconds, _ = forked(work, runs / f"{name}.result")
    if status:
        print(f"{name} failed, see {log}", flush=True)
        return None
    return {"cpu_seconds": round(seconds, 1)} | json.loads((runs / f"{name}.result").read_text())


def fill(
    summary: Path,
    runs: Path,
    keys: Iterable[tuple[str, int]],
    train: Callable[[str, int, Path], dict | None],
    minutes: float,
) -> None:
    """Train what is missing of (arm, seed) until so many minutes are over, and write the summary."""
    until = time.monotonic() + 60 * minutes
    os.environ |= {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}  # before torch is imported
    runs.mkdir(parents=True, exist_ok=True)
    done = {row["key"]: row for row in rows_of(summary)} | load(runs / "results.jsonl")
    import_everything()
    for arm, seed in keys:
        key = f"{arm}/{seed}"
        if key in done or time.monotonic() > until or (found := train(arm, seed, runs)) is None:
            continue
        note(done, runs / "results.jsonl", key, {"arm": arm, "seed": seed} | found)
        print(f"{key}: {found['cpu_seconds']:.0f} CPU s", flush=True)
    rows = [row for _, row in sorted(done.items())]
    summary.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


def rows_of(summary: Path) -> list[dict]:
    return json.loads(summary.read_text()) if summary.exists() else []
