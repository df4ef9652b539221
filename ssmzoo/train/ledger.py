"""Which run a command means, and how each run stands: status.txt in its folder.

    running | stopped (resume it) | failed | finished
    <process> <host> <start of the process>, or why it failed

A run that says `running` while its process is gone was killed; `read_status` calls it so.
"""

from __future__ import annotations

import itertools
import os
import shlex
import socket
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from ssmzoo.train.checkpoint import INDEX, find_checkpoint, read_json, write_text
from ssmzoo.train.errors import UserError, user_errors

RUN_DIR = "SSMZOO_RUN_DIR"  # environment variable by which the processes of one run find its folder


def rank() -> int:
    """This process's number within the run, before any process group exists."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", os.environ.get("LOCAL_RANK", 0))))


def resume_command(run_dir: Path) -> str:
    return f"python train.py resume={shlex.quote(str(run_dir))}"


def _started(process: int) -> str:
    """When a process began, in the kernel's ticks; '-' where that cannot be told. Numbers of processes are reused."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return "-"


def write_status(run_dir: Path, status: str, note: str = "") -> None:
    if rank() > 0:
        return
    note = f"{os.getpid()} {socket.gethostname()} {_started(os.getpid())}" if status == "running" else note
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


@user_errors
def choose_run(cfg: DictConfig) -> tuple[DictConfig, Path, bool]:
    """(configuration, run folder, resuming?); a resumed run takes its saved configuration plus what is typed now."""
    from hydra.core.hydra_config import HydraConfig

    hydra_cfg = HydraConfig.get()
    if cfg.get("config") is not None:
        cfg = _again(cfg, Path(cfg.config), hydra_cfg)
    model_name = cfg.get("model_name") or hydra_cfg.runtime.choices.model
    sweep = hydra_cfg.mode.name == "MULTIRUN"
    name = f"{cfg.name}-{hydra_cfg.job.num}" if sweep else str(cfg.name)
    new = Path(cfg.runs_dir) / model_name / name
    if sweep and "optuna" in str(hydra_cfg.sweeper._target_):  # a search that goes on counts its jobs from 0 again
        number = itertools.count(int(hydra_cfg.job.num))
        while new.exists():
            new = new.with_name(f"{cfg.name}-{next(number)}")
    if cfg.resume == "auto":
        named = any(o.startswith("name=") for o in hydra_cfg.overrides.task)
        if sweep and not named:
            raise UserError("resume=auto in a sweep needs the sweep's name=, which says which runs are meant")
        run_dir = (new if (new / "config.yaml").exists() else None) if named else newest_unfinished(new.parent)
    else:
        run_dir = None if cfg.resume is None else Path(cfg.resume)
    if run_dir is None:
        if rank() > 0:
            new = Path(os.environ.get(RUN_DIR, new))
        elif (new / "config.yaml").exists():
            raise UserError(f"{new} holds a run already; choose another name= or continue it with resume={new}")
        OmegaConf.update(cfg, "resume", None)
        OmegaConf.update(cfg, "model_name", model_name, force_add=True)
        return cfg, new, False
    if not (run_dir / "config.yaml").exists():
        raise UserError(f"resume={cfg.resume}: {run_dir} is not a run folder (no config.yaml)")
    status, note = read_status(run_dir)
    if status == "running" and rank() == 0 and note.split()[1:2] == [socket.gethostname()]:
        process = note.split()[0]
        raise UserError(f"{run_dir} is being trained by process {process}; stop that first (kill {process})")
    return _merge(cfg, run_dir, hydra_cfg), run_dir, True


def _again(cfg: DictConfig, source: Path, hydra_cfg) -> DictConfig:
    """The configuration of an earlier run, under the name and in the folder of this one."""
    run_dir = source if source.is_dir() else source.parent
    if not (run_dir / "config.yaml").exists():
        raise UserError(f"config={source}: neither a run folder nor its config.yaml")
    merged = _merge(cfg, run_dir, hydra_cfg)
    for key in ("name", "runs_dir", "resume"):
        OmegaConf.update(merged, key, cfg[key])
    return merged


def _merge(cfg: DictConfig, run_dir: Path, hydra_cfg) -> DictConfig:
    saved = OmegaConf.load(run_dir / "config.yaml")
    typed = [o.lstrip("+") for o in hydra_cfg.overrides.task if not o.startswith("~")]
    groups = set(hydra_cfg.runtime.choices)
    typed = [o for o in typed if o.split("=")[0] not in groups | {"resume", "config", "name", "runs_dir"}]
    return OmegaConf.merge(saved, OmegaConf.from_dotlist(typed))


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
    best = read_json(run_dir / "checkpoints" / INDEX).get("best") or [{"value": float("nan")}]
    return float(best[0]["value"])
