"""Which run a command means, and how each run stands: status.txt in its folder.

    running | stopped (resume it) | failed | finished
    <process> <host> <start of the process>, or why it failed

A run that says `running` while its process is gone was killed; `read_status` calls it so.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import shlex
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from omegaconf import DictConfig, OmegaConf

from ssmzoo.checkpoint_files import find_checkpoint, read_index
from ssmzoo.safe_yaml import read_yaml
from ssmzoo.terminal import printable
from ssmzoo.train import changes
from ssmzoo.train.checkpoint import write_text
from ssmzoo.train.config import LOGGER_KEYS, plain_config
from ssmzoo.train.errors import UserError, user_errors

RUN_DIR = "SSMZOO_RUN_DIR"  # environment variable by which the processes of one run find its folder
LOCK = ".lock"  # held by the process that trains


def rank() -> int:
    """This process's number within the run, before any process group exists."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", os.environ.get("LOCAL_RANK", 0))))


def resume_command(run_dir: Path) -> str:
    return f"python train.py resume={shlex.quote(str(run_dir))}"


def _started(process: int) -> str:
    """When a process began, in the kernel's ticks; '-' where that is unknown. Numbers of processes are reused."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return "-"


def write_status(run_dir: Path, status: str, note: str = "") -> None:
    if rank() > 0:
        return
    note = f"{os.getpid()} {socket.gethostname()} {_started(os.getpid())}" if status == "running" else note
    if not run_dir.is_dir():  # removed while the run went on, which is said elsewhere
        return
    try:
        write_text(run_dir / "status.txt", f"{status}\n{note}\n")
    except OSError as error:
        print(f"warning: {run_dir / 'status.txt'} could not be written ({error})", flush=True)


def read_status(run_dir: Path) -> tuple[str, str]:
    """(running, killed, stopped, failed, finished or unknown; the note)."""
    try:
        status, _, note = (run_dir / "status.txt").read_text(encoding="utf-8").strip().partition("\n")
    except (OSError, UnicodeDecodeError):
        return "unknown", ""
    if status == "running" and len(note.split()) == 3:
        process, host, started = note.split()
        here = host == socket.gethostname()
        if here and not (_alive(int(process)) and _started(int(process)) == started):
            return "killed", note
    return status, note


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


class Run(NamedTuple):
    """Which run a command means.

    folder     of the run; of a new one, which nobody has claimed yet, the name may still change (`claimed`)
    resuming   go on with a run that is there;  named  its name was typed
    changes    {key: (saved, typed)} of what a resume applies
    """

    cfg: DictConfig
    folder: Path
    resuming: bool
    named: bool
    changes: dict = {}


@user_errors
def choose_run(cfg: DictConfig) -> Run:
    """A new run, or one that goes on with its saved configuration and what is typed now (see `changes`)."""
    from hydra.core.hydra_config import HydraConfig

    hydra_cfg = HydraConfig.get()
    if cfg.get("config") is not None:
        cfg = _again(cfg, Path(cfg.config), hydra_cfg)
    model_name = cfg.get("model_name") or hydra_cfg.runtime.choices.model
    named = any(o.lstrip("+").startswith("name=") for o in hydra_cfg.overrides.task)
    new = Path(cfg.runs_dir) / _folder_name("model_name", model_name) / _name(cfg, hydra_cfg)
    if cfg.resume == "auto":
        if hydra_cfg.mode.name == "MULTIRUN" and not named:
            raise UserError("resume=auto in a sweep needs the sweep's name=, which says which runs are meant")
        run_dir = (new if (new / "config.yaml").exists() else None) if named else newest_unfinished(new.parent)
    else:
        run_dir = None if cfg.resume is None else Path(cfg.resume)
    if run_dir is None:
        if rank() > 0:
            new = Path(os.environ.get(RUN_DIR, new))
        elif (new / "config.yaml").exists() and named:
            raise UserError(f"{new} holds a run already; choose another name= or continue it with resume={new}")
        OmegaConf.update(cfg, "resume", None)
        OmegaConf.update(cfg, "model_name", model_name, force_add=True)
        return Run(cfg, new, False, named)
    if not (run_dir / "config.yaml").exists():
        raise UserError(f"resume={cfg.resume}: {run_dir} is not a run folder (no config.yaml)")
    if cfg.resume != "auto" and named and cfg.name != run_dir.name:
        raise UserError(f"name={cfg.name} belongs to a new run; {run_dir} keeps its name")
    placed = any(o.lstrip("+").startswith("runs_dir=") for o in hydra_cfg.overrides.task)
    if cfg.resume != "auto" and placed and Path(cfg.runs_dir).resolve() not in run_dir.resolve().parents:
        raise UserError(f"runs_dir={cfg.runs_dir} is where new runs go; {run_dir} stays where it is")
    status, note = read_status(run_dir)
    if status == "running" and rank() == 0 and note.split()[1:2] == [socket.gethostname()]:
        raise _busy(run_dir)
    merged, found = _continued(cfg, run_dir, hydra_cfg)
    return Run(merged, run_dir, True, named, found)


def _name(cfg: DictConfig, hydra_cfg) -> str:
    """The run folder's name, with the job's number in a sweep."""
    name = _folder_name("name", cfg.name)
    if hydra_cfg.mode.name != "MULTIRUN":
        return name
    number = itertools.count(int(hydra_cfg.job.num))
    name = f"{name}-{next(number)}"
    if "optuna" in str(OmegaConf.select(hydra_cfg, "sweeper._target_")):  # one that goes on counts from 0 again
        model_name = cfg.get("model_name") or hydra_cfg.runtime.choices.model
        while (Path(cfg.runs_dir) / model_name / name).exists():
            name = f"{cfg.name}-{next(number)}"
    return name


def _folder_name(key: str, value) -> str:
    """A name that stays inside the folder of runs."""
    path, text = Path(str(value)), str(value)
    if value is None or not text.strip() or path.is_absolute() or not path.parts or ".." in path.parts:
        raise UserError(f"{key}={value}: give a name below runs_dir, neither empty nor a path to elsewhere")
    if printable(text) != text or "\n" in text:
        raise UserError(f"{key}={text.encode('unicode_escape').decode()}: control characters cannot be part of a name")
    return text


def _saved(run_dir: Path) -> dict:
    return plain_config(read_yaml(run_dir / "config.yaml"), str(run_dir / "config.yaml"))


def _again(cfg: DictConfig, source: Path, hydra_cfg) -> DictConfig:
    """The configuration of an earlier run with what is typed now, under the name and in the folder of this one."""
    run_dir = source if source.is_dir() else source.parent
    if not (run_dir / "config.yaml").exists():
        raise UserError(f"config={source}: neither a run folder nor its config.yaml")
    saved, choices = _saved(run_dir), hydra_cfg.runtime.choices
    if choices.model != saved.get("model_name") and f"model={choices.model}" in hydra_cfg.overrides.task:
        saved |= {"model_name": choices.model, "model": {}}  # nothing of the other model's arguments stays
    merged = _with_changes(saved, cfg, hydra_cfg)[0]
    for key in ("name", "runs_dir", "resume"):
        OmegaConf.update(merged, key, cfg[key])
    return merged


def _continued(cfg: DictConfig, run_dir: Path, hydra_cfg) -> tuple[DictConfig, dict]:
    """(configuration of a run that goes on, its changes): what is typed now applies where it can, or is refused."""
    merged, found = _with_changes(_saved(run_dir), cfg, hydra_cfg)
    changes.refuse_fixed(found, run_dir)
    if found and rank() == 0:
        print(
            f"{run_dir} goes on with {', '.join(f'{k}={v} (was {old})' for k, (old, v) in found.items())}", flush=True
        )
    return merged, found


def _with_changes(saved: dict, cfg: DictConfig, hydra_cfg) -> tuple[DictConfig, dict]:
    """(saved configuration with what the command line says otherwise, {key: (saved, typed)})."""
    own = f"model={saved.get('model_name')}"  # its own model, named again
    typed = [o for o in hydra_cfg.overrides.task if o.lstrip("+") != own]
    keys = changes.typed_keys(typed, hydra_cfg.runtime.choices, saved.get("model_name"))
    found = changes.changed(cfg, saved, keys)
    merged = OmegaConf.create(saved)
    for key, (_, value) in found.items():
        OmegaConf.update(merged, key, value, force_add=True)
    kind = OmegaConf.select(merged, "logger.kind")
    if "logger.kind" in found:  # nothing of the other logger's options stays
        merged.logger = {k: v for k, v in merged.logger.items() if k == "kind" or k in LOGGER_KEYS.get(kind, ())}
    return merged, found


def _busy(run_dir: Path) -> UserError:
    note = read_status(run_dir)[1].split()
    who = f"process {note[0]} on {note[1]}" if len(note) == 3 else "another process"
    how = f" (kill {note[0]})" if len(note) == 3 else ""
    return UserError(f"{run_dir} is being trained by {who}; stop that first{how}")


@contextlib.contextmanager
def claimed(run: Run) -> Iterator[Path]:
    """The folder of a run, for this process alone until it ends in whatever way. Raises UserError when it is taken.

    A new run that was not named takes the next name; further ranks follow the first, which claims for all. Of a new run
    that ends before it has a configuration nothing stays.
    """
    if rank() > 0:
        yield run.folder
        return
    folder, made, lock = _claim(run)
    try:
        yield folder
    finally:
        if not run.resuming and not (folder / "config.yaml").exists():
            (folder / LOCK).unlink(missing_ok=True)
            _unmake(made)
        lock.close()


@user_errors
def _claim(run: Run):
    """(folder, folders that were made for it, the file that is locked)"""
    folder = run.folder
    for number in itertools.count(2):
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = _lock(folder / LOCK)
        except OSError as error:
            _unmake(made)
            raise UserError(f"{printable(str(folder))} cannot be written: {error.strerror or error}") from None
        if lock is not None and (run.resuming or not (folder / "config.yaml").exists()):
            return folder, made, lock
        if lock is not None:
            lock.close()
        if run.named and lock is not None:
            raise UserError(f"{folder} holds a run already; choose another name= or continue it with resume={folder}")
        if run.named or run.resuming:
            raise _busy(folder)
        folder = run.folder.with_name(f"{run.folder.name}-{number}")


def _unmake(made: list[Path]) -> None:
    """Remove folders that were made for a run that did not begin, the innermost (whose content is the run's) first."""
    for i, path in enumerate(made):
        if i == 0:
            shutil.rmtree(path, ignore_errors=True)
            continue
        with contextlib.suppress(OSError):  # somebody else's run has come to lie there
            path.rmdir()


def _lock(path: Path):
    """The open file, locked for this process and not for those that it forks; None when another process has it.

    The kernel lets go of it when the process is gone. Where a file system knows no locks nothing is held back.
    """
    file = open(path, "a+")
    try:
        import fcntl

        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # not POSIX
        pass
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            file.close()
            return None
        print(f"warning: {path} cannot be locked ({error}): let no second process continue this run", flush=True)
    return file


def newest_unfinished(folder: Path) -> Path | None:
    """The run of a model that was last at work and neither finished nor is at work now."""
    runs = [file.parent for file in folder.glob("*/config.yaml")]
    runs = [run for run in runs if read_status(run)[0] not in ("finished", "running")]

    def changed(run: Path) -> float:
        return max(file.stat().st_mtime for file in run.iterdir() if file.is_file())

    return max(runs, key=changed, default=None)


def best_value(run_dir: Path) -> float:
    """The monitored value of a run's best checkpoint; nan when it has none."""
    find_checkpoint(run_dir)
    best = (read_index(run_dir / "checkpoints") or {}).get("best") or [{"value": float("nan")}]
    return float(best[0]["value"])
