"""What papers claim, tried in small: python benchmarks/claims.py

    python benchmarks/claims.py --budget 60           what is missing, for so many minutes; then the page
    python benchmarks/claims.py --only res_vmamba     one claim, or several with commas between them
    python benchmarks/claims.py --list                what there is, and how much of it is done
    python benchmarks/claims.py --page-only           the page and its figures, from docs/results/claims.json

Every run has one thread. The learning rate of an arm is chosen among three on a seed of its own (100), by what is
measured at the end; then seeds 0, 1 and 2 are trained at it. A run that was stopped goes on from its last checkpoint,
and what is finished is not repeated. The claims are in benchmarks/claims_list.py, the page's form in
benchmarks/claims_page.py. --scripts calls the claims that have scripts and pages of their own (recall, ...), too.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from claims_list import CLAIMS, SCRIPTS, Arm, Claim
from claims_page import write_page
from recall import import_everything, train_here

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results" / "claims.json"
RATE_SEED, SEEDS, FACTORS = 100, (0, 1, 2), (0.5, 1.0, 2.0)


class OutOfTime(Exception):
    """The budget is used up."""


class NoFiles(Exception):
    """A claim's own files cannot be had."""


class RunFailed(Exception):
    """train.py ended with an error, which its log tells."""


def train_in_fork(words: list[str], log: Path, left: float) -> float:
    """train.py with these words in a fork that has everything imported: CPU seconds. It is ended after `left` seconds
    (OutOfTime)."""
    import_everything()
    child = os.fork()
    if child == 0:
        os._exit(train_here(words, log, dict))
    until = time.monotonic() + left
    while True:
        pid, status, usage = os.wait4(child, os.WNOHANG)
        if pid:
            break
        if time.monotonic() > until:
            os.kill(child, signal.SIGKILL)
            os.wait4(child, 0)
            raise OutOfTime
        time.sleep(0.2)
    if status:
        raise RunFailed(f"train.py {' '.join(words)} failed, see {log}")
    return usage.ru_utime + usage.ru_stime


def finished(words: list[str], runs: Path, name: str, until: float) -> tuple[Path, float]:
    """The folder of the run that train.py makes with these words, and its CPU seconds; it is made now, or goes on from
    its last checkpoint, unless it was finished before. OutOfTime at `until` (of time.monotonic)."""
    found = next((f.parent for f in runs.glob(f"*/{name}/status.txt")), None)
    if found and not list(found.glob("checkpoints/*")):
        shutil.rmtree(found)  # it was ended before there was anything to go on from
        found = None
    kept = found / "cpu_seconds.json" if found else None
    used = json.loads(kept.read_text()) if kept and kept.exists() else 0.0
    if found is None or not (found / "status.txt").read_text().startswith("finished"):
        left = until - time.monotonic()
        if left <= 0:
            raise OutOfTime
        arguments = [f"resume={found}"] if found else [*words, f"name={name}", f"runs_dir={runs}"]
        (runs / "logs").mkdir(parents=True, exist_ok=True)
        used += train_in_fork(arguments, runs / "logs" / f"{name}.log", left)
        found = next(f.parent for f in runs.glob(f"*/{name}/status.txt"))
        (found / "cpu_seconds.json").write_text(json.dumps(used))
    return found, used


def prepared(claim: Claim, runs: Path, until: float) -> Path:
    """The folder of the claim's own files, made now unless it is there. NoFiles where it cannot be."""
    files = runs / "data" / claim.name
    if claim.prepare is None or files.exists():
        return files
    if time.monotonic() > until:
        raise OutOfTime
    made = files.with_name(f".{claim.name}")
    shutil.rmtree(made, ignore_errors=True)
    try:
        claim.prepare(made)
    except FileNotFoundError as error:
        raise NoFiles(error) from None
    return made.rename(files)


def train(claim: Claim, arm: Arm, rate: float, seed: int, runs: Path, until: float) -> dict[str, float]:
    """{"value": what the claim measures, "also": what it tells beside, "cpu_seconds"} of a run, which is made or
    finished now if it has to be."""
    name = f"{claim.name}-{arm.slug}-{rate:.3g}-seed{seed}"
    files = prepared(claim, runs, until)
    words = [word.replace("{data}", str(files)) for word in (*claim.common, *arm.overrides)]
    run, used = finished([*words, f"optim.lr={rate:g}", f"seed={seed}"], runs, name, until)
    row = {"value": claim.measure(run), "cpu_seconds": round(used, 1)}
    return row | ({"also": claim.also[1](run)} if claim.also else {})


def try_arm(claim: Claim, arm: Arm, runs: Path, until: float, note) -> None:
    """The rate on a seed of its own, unless a seed has been trained at one; then the seeds."""
    known = load().get(claim.name, {}).get(arm.name, {})
    if chosen := known or load().get(claim.rates_of, {}).get(arm.name, {}):
        best = next(iter(chosen.values()))["lr"]
    else:
        rates = {rate: train(claim, arm, rate, RATE_SEED, runs, until) for rate in (f * arm.lr for f in FACTORS)}
        best = (max if claim.higher else min)(rates, key=lambda r: rates[r]["value"])
    for seed in SEEDS:
        if str(seed) in known:
            continue
        row = train(claim, arm, best, seed, runs, until)
        print(f"{claim.name}: {arm.name}, seed {seed}, lr {best:g}: {row['value']:.4g}", flush=True)
        note(claim.name, arm.name, best, seed, row)


def run(claims: list[Claim], runs: Path, minutes: float) -> None:
    """Whatever is missing, until the time is over."""
    until = time.monotonic() + 60 * minutes

    def note(claim: str, arm: str, rate: float, seed: int, row: dict) -> None:
        known = load()
        known.setdefault(claim, {}).setdefault(arm, {})[str(seed)] = row | {"lr": rate}
        RESULTS.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")

    try:
        for claim in claims:
            missing = [a for a in claim.arms if len(load().get(claim.name, {}).get(a.name, {})) < len(SEEDS)]
            for arm in missing:
                try:
                    try_arm(claim, arm, runs, until, note)
                except RunFailed as error:
                    print(f"{claim.name}: {arm.name}: {error}", flush=True)
                except NoFiles as error:
                    print(f"{claim.name}: {error}", flush=True)
                    break
    except OutOfTime:
        print(f"{minutes:g} minutes are over; the same command goes on", flush=True)


def run_scripts(minutes: float) -> None:
    """The claims with scripts of their own, one after the other."""
    until = time.monotonic() + 60 * minutes
    for name, script in SCRIPTS.items():
        left = until - time.monotonic()
        if left <= 0:
            print(f"no time left for {name}", flush=True)
            return
        arguments = [word.format(minutes=f"{left / 60:.3g}") for word in script.command]
        print(f"{name}: python {' '.join(arguments)}", flush=True)
        try:
            subprocess.run(
                [sys.executable, *arguments],
                cwd=ROOT,
                check=False,
                env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
                timeout=None if left == float("inf") else left,
            )
        except subprocess.TimeoutExpired:
            print(f"{name}: stopped; its finished runs are kept", flush=True)


def load() -> dict:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def show() -> None:
    known = load()
    for name, claim in CLAIMS.items():
        done = sum(len(known.get(name, {}).get(a.name, {})) for a in claim.arms)
        print(f"{name:<28}{done} of {len(SEEDS) * len(claim.arms)} runs   {claim.sentence}")
    for name, script in SCRIPTS.items():
        print(f"{name:<28}python {' '.join(script.command)}   {script.page}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(CLAIMS), help=f"some of {', '.join(CLAIMS)}")
    parser.add_argument(
        "--budget", type=float, default=float("inf"), help="minutes; what runs then is stopped and kept"
    )
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "claims")
    parser.add_argument("--scripts", action="store_true", help="also the claims with scripts of their own")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--page-only", action="store_true")
    arguments = parser.parse_args()
    names = arguments.only.split(",")
    if unknown := [n for n in names if n not in CLAIMS]:
        parser.error(f"unknown claim {unknown[0]}; choose from {', '.join(CLAIMS)}")
    if arguments.list:
        return show()
    started = time.monotonic()
    if not arguments.page_only:
        run([CLAIMS[n] for n in names], arguments.runs.resolve(), arguments.budget)
        if arguments.scripts:
            run_scripts(arguments.budget - (time.monotonic() - started) / 60)
    write_page(load(), RESULTS.parent)


if __name__ == "__main__":
    main()
