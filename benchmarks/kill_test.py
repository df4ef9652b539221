"""Kill training runs with SIGKILL at random moments, resume them, and compare every logged number with a whole run.

    python benchmarks/kill_test.py                       at least 13 kills for each of four tasks (minutes on one core)
    python benchmarks/kill_test.py --kills 4 --only formal --out /tmp/kills
    python benchmarks/kill_test.py --processes 2         each run on two ranks (DDP over gloo); a kill hits one or both
    python benchmarks/kill_test.py --rivals              every resume is started twice at once: one must be refused

Each run is the real train.py in a process of its own (forked after the imports, which is all that is left out). Of
three kills, one comes at a random time, one as soon as a checkpoint's temporary folder appears, and one a random
fraction of a millisecond to 30 ms after that; half of them take the data workers along, the others leave them behind.
After every kill each checkpoint that index.json names must pass its SHA-256 and load, and every row of metrics.csv
must equal the whole run's bit for bit. At the end the weights must be equal too. Prints a table; exit status 1 on a
mismatch.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a process that forks must not have started threads
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

COMMON = ["trainer.accelerator=cpu", "trainer.log_every_n_steps=1", "callbacks.checkpoint.every_n_minutes=0"]
CASES = {  # what each covers -> options; intervals share no factor, so that saves fall on every phase of the loop
    "language": (
        "2 workers, accumulation over 3 with validation in mid-phase, EMA, dropped tokens",
        [
            "model=moe_mamba",
            "model.d_model=16",
            "model.n_blocks=1",
            "model.n_experts=4",
            "data.seq_len=32",
            "data.batch_size=2",
            "data.val_tokens=512",
            "data.num_workers=2",
            "task.sample_tokens=4",
            "trainer.max_steps=60",
            "trainer.accumulate_grad_batches=3",
            "trainer.val_check_interval=20",
            "callbacks.checkpoint.every_n_steps=4",
            "callbacks.ema.decay=0.9",
        ],
    ),
    "classification": (
        "2 workers, augmentation, mixup, stochastic depth, several epochs, EMA, keep-best 2",
        [
            "model=vim",
            "model.embed_dim=16",
            "model.depth=2",
            "model.d_state=2",
            "data.image_size=16",
            "model.drop_path_rate=0.2",
            "data.batch_size=64",
            "data.num_workers=2",
            "task.mixup=0.8",
            "trainer.max_steps=60",
            "trainer.val_check_interval=15",
            "trainer.limit_val_batches=1",
            "callbacks.checkpoint.every_n_steps=5",
            "callbacks.checkpoint.keep_best=2",
            "callbacks.ema.decay=0.9",
        ],
    ),
    "restoration": (
        "random crops and flips, Adam, keep-last 3, validation on pictures",
        [
            "model=mambair",
            "model.embed_dim=30",
            "model.depths=[1]",
            "model.d_state=2",
            "data.patch_size=16",
            "data.batch_size=2",
            "data.holdout=1",
            "data.val_crop=24",
            "data.num_workers=1",
            "trainer.max_steps=60",
            "trainer.val_check_interval=12",
            "callbacks.checkpoint.every_n_steps=4",
            "callbacks.checkpoint.keep_last=3",
        ],
    ),
    "formal": (
        "endless strings with a curriculum, accumulation over 2, Muon",
        [
            "model=lstm",
            "model.state_size=16",
            "data.language=parity",
            "data.batch_size=16",
            "data.val_samples=8",
            "data.test_length=40",
            "data.test_samples=4",
            "data.curriculum_steps=40",
            "optim=muon",
            "trainer.max_steps=120",
            "trainer.accumulate_grad_batches=2",
            "trainer.val_check_interval=35",
            "callbacks.checkpoint.every_n_steps=7",
        ],
    ),
}


class Tally(NamedTuple):
    """What one task's runs showed."""

    kills: int
    in_write: int  # of which while a checkpoint was being written
    resumes: int
    rows: int  # rows of metrics.csv compared
    mismatches: int
    checkpoints: int  # that were checked and loaded after a kill
    unreadable: int
    refused: int = 0  # rivals that wanted to continue the same run


def child(arguments: list[str], log: Path) -> int:
    """Fork a process that does what `python train.py <arguments>` does; its output goes to `log`."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.setsid()
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        sys.argv = [str(ROOT / "train.py"), *arguments]  # what Lightning starts further ranks with
        from ssmzoo.cli.train import train

        train()
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def ended(pid: int, leave: bool = False) -> int | None:
    """Exit status of a child, or None while it runs; `leave` it to be asked for again."""
    if leave:
        found = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        return None if found is None else found.si_status
    done, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def ranks(pid: int) -> list[int]:
    """A run's first process and those that it started for further ranks."""
    found = [pid]
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            started = (entry / "cmdline").read_bytes().split(b"\0")
        except (OSError, ValueError):  # gone meanwhile
            continue
        if parent == pid and any(word.endswith(b"train.py") for word in started):
            found.append(int(entry.name))
    return found


def kill(pid: int, with_workers: bool, victim: int | None = None) -> None:
    """Kill a run: all of its processes, or its first one, or (`victim`) another, whose loss must end the rest."""
    os.killpg(pid, signal.SIGKILL) if with_workers else os.kill(victim or pid, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while victim not in (None, pid) and time.monotonic() < deadline and ended(pid, leave=True) is None:
        time.sleep(0.05)
    if victim not in (None, pid) and ended(pid, leave=True) is None:
        print(f"  process {pid} went on a minute after rank {victim} was killed", flush=True)
        os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def writing(store: Path) -> bool:
    """Is a checkpoint being written now, as far as files show?"""
    return store.is_dir() and any(name.startswith(".") for name in os.listdir(store))


def strike(pid: int, store: Path, seconds: float, rng: random.Random) -> tuple[bool, bool]:
    """Wait for a moment and kill: (killed, while a checkpoint was written). Not killed: the run came to its end."""
    when = rng.choice(("anywhere", "write begins", "within a write"))
    start = time.monotonic()
    wait = rng.uniform(0, seconds) if when == "anywhere" else rng.uniform(0, seconds / 2)
    while time.monotonic() - start < wait:
        if ended(pid) is not None:
            return False, False
        time.sleep(0.002)
    if when != "anywhere":
        while not writing(store):
            if ended(pid) is not None:
                return False, False
            time.sleep(0.0002)
        if when == "within a write":
            time.sleep(rng.uniform(0, 0.03))
    with_workers = rng.random() < 0.5
    kill(pid, with_workers, None if with_workers else rng.choice(ranks(pid)))
    return True, writing(store)


def rows_of(run: Path) -> list[dict[str, float]]:
    """What metrics.csv holds, without the times, which differ from run to run."""
    from ssmzoo.train.logger import read_metrics

    return [
        {k: v for k, v in row.items() if not k.startswith(("time/", "system/"))}
        for row in read_metrics(run / "metrics.csv")
    ]


def compare(run: Path, whole: list[dict[str, float]]) -> tuple[int, int]:
    """(rows, rows that are not the whole run's at the same step)."""
    rows = rows_of(run)
    return len(rows), sum(a != b for a, b in zip(rows, whole)) + max(0, len(rows) - len(whole))


def check_checkpoints(store: Path) -> tuple[int, int]:
    """(checkpoints that index.json names, those that cannot be loaded)."""
    from ssmzoo.checkpoint_files import read_json, read_weights
    from ssmzoo.train.checkpoint import FolderCheckpointIO

    if not (store / "index.json").exists():
        return 0, 0
    index = read_json(store / "index.json")
    names, bad = {*index["recent"], *(b["name"] for b in index["best"])} | {index["last"]} - {None}, 0
    for name in names:
        try:
            if (store / name / "trainer.ckpt").exists():
                FolderCheckpointIO(dict).load_checkpoint(store / name)
            else:
                read_weights(store / name)
        except Exception as error:
            print(f"  {store / name}: {error}", flush=True)
            bad += 1
    return len(names), bad


def torture(name: str, kills: int, out: Path, seed: int, processes: int = 1, rivals: bool = False) -> Tally:
    """Kill runs of one task until `kills` is reached."""
    rng = random.Random(f"{name} {seed}")
    options = [*CASES[name][1], *COMMON, f"runs_dir={out}", f"hydra.run.dir={out}"]
    options += ["trainer.strategy=ddp", f"trainer.devices={processes}"] * (processes > 1)
    if name == "language":
        options += [f"data.path={ROOT / 'ssmzoo' / 'ops'}/*.py", f"data.cache_dir={out / 'cache'}"]
    model = next(o for o in options if o.startswith("model=")).removeprefix("model=")
    log, started = out / f"{name}.log", time.monotonic()
    pid = child([*options, f"name={name}-whole"], log)
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0:
        raise SystemExit(f"the whole run of {name} failed; see {log}")
    seconds = time.monotonic() - started
    whole = rows_of(out / model / f"{name}-whole")
    tally, attempt = Tally(0, 0, 0, 0, 0, 0, 0), 0
    while tally.kills < kills:
        run = out / model / f"{name}-{attempt}"
        attempt += 1
        tally = _one_run(name, options, run, whole, seconds, rng, log, tally, rivals)
    print(f"{name}: {tally}, {len(whole)} rows per run, {time.monotonic() - started:.0f} s", flush=True)
    return tally


def rival(command: list[str], log: Path) -> tuple[int, int]:
    """Start one command twice at once: (process that goes on, how many were refused with status 2)."""
    both = [child(command, log), child(command, log)]
    while all(ended(pid, leave=True) is None for pid in both):
        time.sleep(0.01)
    lost = next(pid for pid in both if ended(pid, leave=True) is not None)
    (left,) = set(both) - {lost}
    return left, int(ended(lost) == 2)


def _one_run(name, options, run, whole, seconds, rng, log, tally: Tally, rivals: bool) -> Tally:
    """Kill and resume one run until it ends by itself; adds to the tally."""
    store, command = run / "checkpoints", [*options, f"name={run.name}"]
    while True:
        pid, refused = rival(command, log) if rivals and command[0].startswith("resume=") else (child(command, log), 0)
        tally = tally._replace(refused=tally.refused + refused)
        killed, in_write = strike(pid, store, seconds, rng)
        if not killed:
            break
        rows, wrong = compare(run, whole)
        count, bad = check_checkpoints(store)
        tally = tally._replace(
            kills=tally.kills + 1,
            in_write=tally.in_write + in_write,
            rows=tally.rows + rows,
            mismatches=tally.mismatches + wrong,
            checkpoints=tally.checkpoints + count,
            unreadable=tally.unreadable + bad,
        )
        print(
            f"  {run.name}: kill {tally.kills} after {rows} rows{', in a write' * in_write}: {wrong} mismatches, "
            f"{count} checkpoints, {bad} unreadable",
            flush=True,
        )
        if (run / "config.yaml").exists():
            command, tally = [f"resume={run}"], tally._replace(resumes=tally.resumes + 1)
    rows, wrong = compare(run, whole)
    wrong += rows != len(whole)
    if not (run / "status.txt").exists() or (run / "status.txt").read_text().split()[0] != "finished":
        print(f"  {run} did not finish; see {log}", flush=True)
        raise SystemExit(1)
    wrong += not _equal_weights(run, run.with_name(f"{name}-whole"))
    left = [f for f in os.listdir(store) if f.startswith(".")]
    if left:
        print(f"  left behind in {store}: {left}", flush=True)
    return tally._replace(rows=tally.rows + rows, mismatches=tally.mismatches + wrong + bool(left))


def _equal_weights(a: Path, b: Path) -> bool:
    from ssmzoo.checkpoint_files import read_weights

    for which in ("best", "last"):
        first, second = read_weights(a, which), read_weights(b, which)
        if first.keys() != second.keys() or not all((first[k] == second[k]).all() for k in first):
            return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=13, help="at least so many kills per task (default 13)")
    parser.add_argument("--only", choices=CASES, action="append", help="one of the tasks; may be repeated")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--processes", type=int, default=1, help="ranks of every run (default 1)")
    parser.add_argument("--rivals", action="store_true", help="start every resume twice at once")
    parser.add_argument("--out", type=Path, default=Path("kill_test"), help="folder for the runs")
    args = parser.parse_args()
    shutil.rmtree(args.out, ignore_errors=True)
    args.out.mkdir(parents=True)
    for module in ("ssmzoo.train.run", "lightning", "hydra", "matplotlib.pyplot", "timm.data"):  # before the forks
        importlib.import_module(module)

    more = (args.out.absolute(), args.seed, args.processes, args.rivals)
    tallies = {name: torture(name, args.kills, *more) for name in args.only or CASES}
    tallies["all"] = Tally(*(sum(values) for values in zip(*tallies.values())))
    print(f"\n{'':<16}" + "".join(f"{field:>13}" for field in Tally._fields))
    for name, tally in tallies.items():
        print(f"{name:<16}" + "".join(f"{value:>13}" for value in tally))
    (args.out / "tally.json").write_text(json.dumps({k: t._asdict() for k, t in tallies.items()}, indent=1))
    total = tallies["all"]
    lacking = total.resumes - total.refused if args.rivals else 0  # every resume had one rival
    return int(total.mismatches + total.unreadable + lacking > 0)


if __name__ == "__main__":
    sys.exit(main())
