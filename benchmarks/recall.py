"""Fill docs/results/recall.md: the claims about recall and memory, each in small, by runs of train.py.

    python benchmarks/recall.py --budget 70             what is missing, for so many minutes; then the page
    python benchmarks/recall.py --only mqar,prefix      some of the claims
    python benchmarks/recall.py --page-only

Every arm first trains once per learning rate on seed 100; the rate with the lowest validation loss then trains seeds
0, 1 and 2. A run is a process of its own on one thread. A finished run is one line of results.jsonl under --runs, then
of docs/results/recall.json, from which recall_page.py writes the page; what is in either is not repeated.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from recall_claims import CLAIMS, SEARCH_SEED, SEEDS, Arm, Claim

ROOT = Path(__file__).resolve().parent.parent
SUMMARY = ROOT / "docs/results/recall.json"


class Job(NamedTuple):
    """One run of train.py."""

    claim: str
    arm: Arm
    lr: float
    seed: int

    @property
    def key(self) -> str:
        return f"{self.claim}/{self.arm.name}/lr{self.lr:g}/seed{self.seed}"

    @property
    def name(self) -> str:
        return "".join(c if c.isalnum() or c in ".-" else "_" for c in self.key.replace("/", "-"))

    def folder(self, runs: Path) -> Path | None:
        """Of the run, when it is there: <runs>/<model>/<name>."""
        return next(runs.glob(f"*/{self.name}"), None)


def missing(name: str, claim: Claim, seeds: tuple[int, ...], results: dict[str, dict]) -> Iterator[Job]:
    """What a claim has still to run, in order: rates of all arms, then seed by seed over all arms. Looks at the results
    when it is asked for the next one."""
    for arm in claim.arms:
        for lr in arm.rates if len(arm.rates) > 1 else ():
            job = Job(name, arm, lr, SEARCH_SEED)
            if job.key not in results:
                yield job
    for seed in seeds:
        for arm in claim.arms:
            lr = chosen_rate(name, arm, results)
            if lr is not None and (job := Job(name, arm, lr, seed)).key not in results:
                yield job


def chosen_rate(claim: str, arm: Arm, results: dict[str, dict]) -> float | None:
    """The rate with the lowest validation loss on the seed of the search; None before all have been tried."""
    if arm.like is not None:
        return chosen_rate(claim, next(a for a in CLAIMS[claim].arms if a.name == arm.like), results)
    if len(arm.rates) == 1:
        return arm.rates[0]
    tried = {lr: results.get(Job(claim, arm, lr, SEARCH_SEED).key) for lr in arm.rates}
    return min(arm.rates, key=lambda lr: tried[lr]["loss"]) if all(tried.values()) else None


def words_of(job: Job, claim: Claim, runs: Path) -> list[str]:
    """Arguments of train.py."""
    return [
        *claim.common,
        *(job.arm.overrides + (claim.search if job.seed == SEARCH_SEED else ())),
        *(f"optim.lr={job.lr:g}", f"seed={job.seed}", "trainer.accelerator=cpu", "callbacks.watchdog=null"),
        *(f"name={job.name}", f"runs_dir={runs}"),
    ]


class Running(NamedTuple):
    job: Job
    log: Path
    started: float


def start(job: Job, words: list[str], runs: Path) -> tuple[int, Running]:
    """Begin a run in a process of its own: (its number, what is known of it)."""
    if (left := job.folder(runs)) is not None:  # of a run that was cut off
        shutil.rmtree(left)
    log = runs / f"{job.name}.log"
    child = os.fork()
    if child == 0:
        after = CLAIMS[job.claim].after or (lambda folder: {})
        os._exit(train_here(words, log, lambda: read(job.folder(runs)) | after(job.folder(runs))))
    return child, Running(job, log, time.monotonic())


def result_of(run: Running, cpu_seconds: float) -> dict:
    """What a run left behind."""
    result = run.log.with_suffix(".json")
    found = {"claim": run.job.claim, "arm": run.job.arm.name, "lr": run.job.lr, "seed": run.job.seed}
    found |= {"cpu_seconds": round(cpu_seconds, 1), "wall_seconds": round(time.monotonic() - run.started, 1)}
    found |= json.loads(result.read_text())
    result.unlink()
    run.log.unlink()
    return found


def train_here(words: list[str], log: Path, read_run: Callable[[], dict]) -> int:
    """train.py in this process, a fork that has everything imported; its output goes to `log`, what it found beside."""
    from ssmzoo.cli.train import train

    with open(log, "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["train.py", *words]
    try:
        train()
        log.with_suffix(".json").write_text(json.dumps(read_run()))
    except BaseException:  # a fork must not go on as its parent would
        traceback.print_exc()
        return 1
    return 0


def import_everything() -> None:
    """What every run imports, so that its fork begins at once; on one thread, since threads do not survive a fork."""
    for name in ("ssmzoo.cli.train", "ssmzoo.train.run", "ssmzoo.train.sweep", "ssmzoo.zoo", "matplotlib.pyplot"):
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)


def read(folder: Path) -> dict:
    """What a run folder holds: the best loss, and by kind of task accuracies per size, or the curve of the loss."""
    from ssmzoo.checkpoint_files import find_checkpoint, read_index, read_manifest
    from ssmzoo.train.logger import read_metrics

    rows = read_metrics(folder / "metrics.csv")
    manifest = read_manifest(find_checkpoint(folder))
    best = read_index(folder / "checkpoints")["best"][0]["value"]
    found = {"loss": best, "steps": int(rows[-1]["step"])}
    if (folder / "recall.csv").exists():
        with open(folder / "recall.csv", newline="") as file:
            table = list(csv.DictReader(file))
        names = list(table[0])[:2]
        found["cases"] = {f"{r[names[0]]}x{r[names[1]]}": float(r["accuracy"]) for r in table}
        found["state_bytes"] = {f"{r[names[0]]}x{r[names[1]]}": int(r["state_bytes"] or 0) for r in table}
        found["trained"] = ["x".join(map(str, case)) for case in manifest["data"]["train"]]
        found["other_reading"] = read_otherwise(folder)
    else:
        found["curve"] = [[int(r["step"]), round(r["val/loss"], 5)] for r in rows if "val/loss" in r]
        found["objectives"] = {
            key.removeprefix("val/"): round(value, 5)
            for key, value in next((r for r in reversed(rows) if "val/loss" in r), {}).items()
            if key.startswith("val/")
        }
    return found


def read_otherwise(folder: Path) -> dict[str, float]:
    """Accuracy per size when the context is read twice, or once by a model that was trained to read it twice."""
    from ssmzoo.checkpoint_files import find_checkpoint, read_manifest
    from ssmzoo.train.config import build_node
    from ssmzoo.zoo import load_model

    config = read_manifest(find_checkpoint(folder))["config"]
    task = dict(config["task"]) | {"read_twice": not config["task"].get("read_twice", False)}
    model, _ = load_model(folder)
    table = build_node(task, "ssmzoo.tasks.", model=model).cases(build_node(config["data"], "ssmzoo.data."))
    return {f"{a}x{b}": table.accuracy((a, b)) for a, b in table.sums}


def run(names: list[str], arms: list[str], seeds: tuple[int, ...], runs: Path, minutes: float, jobs: int) -> None:
    """Train what is missing, so many runs at a time, until no time is left to start one. arms: beginnings of names."""
    until, held, given_up = time.monotonic() + 60 * minutes, runs / "results.jsonl", set()
    runs.mkdir(parents=True, exist_ok=True)
    results = kept() | load(held)
    claims = {name: chosen(CLAIMS[name], arms) for name in names}
    import_everything()
    running: dict[int, Running] = {}

    def ready() -> Iterator[tuple[Job, list[str]]]:
        busy = given_up | {r.job.key for r in running.values()}
        for name, claim in claims.items():
            yield from (
                (j, words_of(j, claim, runs))
                for j in missing(name, claim, tuple(s for s in seeds if s in claim.seeds), results)
                if j.key not in busy
            )

    while True:
        while len(running) < jobs and time.monotonic() < until and (found := next(ready(), None)):
            child, begun = start(*found, runs)
            running[child] = begun
        if not running:
            break
        child, status, used = os.wait4(-1, 0)
        done = running.pop(child)
        given_up.add(done.job.key)
        if status:
            print(f"{done.job.key} failed, see {done.log}", flush=True)
            continue
        found = result_of(done, used.ru_utime + used.ru_stime)
        note(results, held, done.job.key, found)
        score = found.get("cases", {})
        mean = f"accuracy {100 * sum(score.values()) / len(score):.1f} %, " if score else ""
        print(f"{done.job.key}: {mean}loss {found['loss']:.4f}, {found['cpu_seconds']:.0f} CPU s", flush=True)
    for name, claim in claims.items():
        if claim.measure is not None and name not in results and time.monotonic() < until:
            note(results, held, name, {"claim": name} | claim.measure(runs))


def chosen(claim: Claim, arms: list[str]) -> Claim:
    return claim._replace(arms=tuple(a for a in claim.arms if not arms or a.name.startswith(tuple(arms))))


def kept() -> dict[str, dict]:
    return {row["key"]: row for row in json.loads(SUMMARY.read_text())} if SUMMARY.exists() else {}


def load(held: Path) -> dict[str, dict]:
    lines = held.read_text().splitlines() if held.exists() else []
    return {row["key"]: row for row in map(json.loads, lines)}


def note(results: dict[str, dict], held: Path, key: str, found: dict) -> None:
    results[key] = {"key": key} | found
    with open(held, "a", encoding="utf-8") as file:
        file.write(json.dumps(results[key]) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(CLAIMS), help=f"some of {', '.join(CLAIMS)}")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--arms", nargs="+", help="beginnings of their names")
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)))
    parser.add_argument("--budget", type=float, default=float("inf"), help="minutes; no run starts after them")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "claims_recall")
    parser.add_argument("--page-only", action="store_true", help="from docs/results/recall.json")
    arguments = parser.parse_args()
    names = arguments.only.split(",")
    if unknown := [n for n in names if n not in CLAIMS]:
        parser.error(f"unknown claim {unknown[0]}; choose from {', '.join(CLAIMS)}")
    runs = arguments.runs.resolve()
    os.environ |= {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}  # before torch is imported
    if not arguments.page_only:
        run(
            names,
            arguments.arms or [],
            tuple(map(int, arguments.seeds.split(","))),
            runs,
            arguments.budget,
            arguments.jobs,
        )
        merged = kept() | load(runs / "results.jsonl")
        SUMMARY.write_text("[\n" + ",\n".join(json.dumps(row) for _, row in sorted(merged.items())) + "\n]\n")
    from recall_page import write_page

    write_page(json.loads(SUMMARY.read_text()), SUMMARY.with_suffix(".md"))
    print(f"written: {SUMMARY.with_suffix('.md')}")


if __name__ == "__main__":
    main()
