"""Sweeps: every run's end is noted, a failed one leaves the others alone, and the last lines say which failed."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ssmzoo.train.errors import RESUME_ME, TrainingFailed

NOTES = "SSMZOO_SWEEP"  # environment variable: the file in which the jobs of a sweep note how they ended


def run_job(action: Callable, cfg) -> float:
    """One run of a sweep; its error goes on to Hydra's launcher, which keeps it until all others have ended."""
    from hydra.core.hydra_config import HydraConfig

    job = HydraConfig.get()
    what = {"job": int(job.job.num), "overrides": [o.lstrip("+") for o in job.overrides.task]}
    what |= {"lr": cfg.get("optim", {}).get("lr")}
    try:
        value = action(cfg)
    except SystemExit as stop:
        _note(what | {"status": "stopped", "why": "asked to stop; resume it"})
        if multiprocessing.parent_process() is not None:  # in a pool, leaving would take the pool along
            raise TrainingFailed(f"stopped with status {stop.code}") from None
        raise
    except Exception as error:
        why = " ".join(str(error).split()) or type(error).__name__
        print(f"error: run {what['job']} of the sweep failed: {why}", file=sys.stderr, flush=True)
        _note(what | {"status": "failed", "why": why})
        raise
    _note(what | {"status": "finished", "value": float(value)})
    return value


def _note(what: dict) -> None:
    if NOTES in os.environ:
        with open(os.environ[NOTES], "a", encoding="utf-8") as file:
            file.write(json.dumps(what) + "\n")  # one write, which the kernel appends as a whole


@contextmanager
def notes() -> Iterator[Callable[[], list[dict]]]:
    """Jobs started inside, in this process or others, note their ends; the function given returns them in order."""
    path, hydras = Path.cwd() / f".sweep-{os.getpid()}.jsonl", Path.cwd() / "multirun.yaml"
    theirs = hydras.exists()  # somebody's own, which stays

    def read() -> list[dict]:
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return sorted((json.loads(line) for line in lines), key=lambda note: note["job"])

    os.environ[NOTES] = str(path)
    try:
        yield read
    finally:
        os.environ.pop(NOTES, None)
        if path.exists() and not theirs:  # Hydra's copy of the sweep's configuration, which every run folder has
            hydras.unlink(missing_ok=True)
        path.unlink(missing_ok=True)


def summary(ends: list[dict]) -> tuple[str, int]:
    """(a line per run, exit status): 75 when one was asked to stop, else 1 when one failed, else 0."""
    count = {status: sum(e["status"] == status for e in ends) for status in ("finished", "failed", "stopped")}
    lines = [f"sweep: {len(ends)} runs, " + ", ".join(f"{n} {status}" for status, n in count.items() if n)]
    common = set.intersection(*(set(e["overrides"]) for e in ends)) if len(ends) > 1 else set()
    differing = [" ".join(o for o in e["overrides"] if o not in common) for e in ends]
    rates = {e.get("lr") for e in ends}
    if len(rates) > 1:  # models bring learning rates along: those that nobody typed are shown, too
        rated = [f"{d} (optim.lr={e['lr']:g})" if e.get("lr") is not None else d for d, e in zip(differing, ends)]
        differing = [d if "optim.lr=" in d else r for d, r in zip(differing, rated)]
    width = max(map(len, differing))
    for e, overrides in zip(ends, differing):
        end = f"{e['value']:.4f}" if e["status"] == "finished" else e["why"]
        lines.append(f"  {e['job']:>3}  {overrides:<{width}}  {e['status']:<8}  {end}")
    return "\n".join(lines), RESUME_ME if count["stopped"] else int(bool(count["failed"]))


def trials_left(total: int, study: str, storage: str) -> int:
    """`${trials_left:20,name,sqlite:///file.db}`: what an interrupted search has still to try, of `total`."""
    return max(0, int(total) - _trials_done(study, storage))


def search_seed(seed: int, study: str, storage: str) -> int:
    """`${search_seed:0,name,sqlite:///file.db}`: another one for every interruption, or trials would be drawn twice."""
    return int(seed) + 1000 * _trials_done(study, storage)


def _trials_done(study: str, storage: str) -> int:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        trials = optuna.load_study(study_name=study, storage=storage).trials
    except KeyError:  # no such study yet
        return 0
    return sum(trial.state.is_finished() for trial in trials)
