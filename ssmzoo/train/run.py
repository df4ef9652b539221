"""The shared loop: a configuration becomes a run folder.

<runs_dir>/<model>/<name>/config.yaml  metrics.csv  curves.png  report.md  checkpoints/  (bad_batch.pt)
"""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import math
import os
import shlex
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from ssmzoo.presets import build_model
from ssmzoo.tasks.micro_batch import is_out_of_memory
from ssmzoo.train import config as configuration
from ssmzoo.train import ledger, optim
from ssmzoo.train.callbacks import RandomStates, StopOnSignal, TimeLimit, interruptible, stop
from ssmzoo.train.checkpoint import (
    FolderCheckpointIO,
    find_checkpoint,
    last_good_checkpoint,
    read_manifest,
    read_weights,
    write_text,
)
from ssmzoo.train.checkpointer import Checkpointer
from ssmzoo.train.errors import RESUME_ME, TrainingFailed, UserError, user_errors
from ssmzoo.train.freed_memory import keep_freed_memory
from ssmzoo.train.guards import Guards
from ssmzoo.train.init_from import start_from
from ssmzoo.train.logger import CSVFile, ending_wandb, start_after, tensorboard_logger, wandb_logger
from ssmzoo.train.progress import NoProfiler, Progress, clock
from ssmzoo.train.report import draw_curves, table, write_report
from ssmzoo.train.watchdog import Watchdog


def train(cfg: DictConfig) -> float:
    """Run what `cfg` says; returns the best value of the task's monitored metric (for sweepers)."""
    _quiet()
    keep_freed_memory()
    unattended = cfg.resume == "auto"
    cfg, run_dir, resuming = ledger.choose_run(cfg)
    if resuming and unattended and ledger.read_status(run_dir)[0] == "finished":
        print(f"{run_dir} is finished")
        return ledger.best_value(run_dir)
    model_name, data, task, plain = _build(cfg, run_dir)
    main_process = ledger.rank() == 0
    if main_process:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_text(run_dir / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(plain)))
        os.environ[ledger.RUN_DIR] = str(run_dir)  # processes that Lightning starts from here belong to the same run
        roles = optim.roles_table(task.model, plain["optim"].get("decay", "roles"))
        print(f"{model_name} in {run_dir}\n{roles}", flush=True)
    with interruptible(run_dir), ending_wandb():
        trainer, checkpointer, signals = _trainer(plain, run_dir, task, data, model_name)
        checkpoint = _continue(run_dir, trainer.loggers) if resuming else None
        ledger.write_status(run_dir, "running")
        started = time.monotonic()
        _fit(trainer, task, data, checkpoint, run_dir)
        if signals.received:
            stop(run_dir, f"stopped by {signals.received} at step {trainer.global_step}")
        if checkpointer.failures:
            stop(run_dir, f"trained to step {trainer.global_step}, but its checkpoint could not be written; make room")
        if trainer.world_size > 1:
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()
        if not main_process:
            sys.exit(0)
        try:
            value = _finish(plain, run_dir, model_name, trainer, task, data, time.monotonic() - started)
        except OSError as error:
            stop(run_dir, f"trained to the end, but the report could not be written ({error})")
    ledger.write_status(run_dir, "finished")
    os.environ.pop(ledger.RUN_DIR, None)
    return value


@user_errors
def _continue(run_dir: Path, loggers: list) -> Path | None:
    """The checkpoint to continue from; what was logged after it is forgotten. None: there is none yet."""
    checkpoint = last_good_checkpoint(run_dir)
    if checkpoint is None:
        print(f"{run_dir} has no checkpoint yet: starting at step 0", flush=True)
    start_after(loggers, read_manifest(checkpoint)["step"] if checkpoint else 0)
    return checkpoint


def _fit(trainer, task, data, checkpoint: Path | None, run_dir: Path) -> None:
    """Lightning's fit; leaves the run's status and a message behind however it ends."""
    try:
        trainer.fit(task, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    except (KeyboardInterrupt, SystemExit) as end:
        if getattr(end, "code", None) == RESUME_ME:  # a signal before the first step, which has been reported
            raise
        stop(run_dir, f"stopped at once at step {trainer.global_step}")  # a second signal
    except Exception as error:
        if is_out_of_memory(error):
            error = TrainingFailed(
                f"out of memory at step {trainer.global_step}: lower data.batch_size (and raise "
                f"trainer.accumulate_grad_batches by as much), set grad_checkpointing=true, or let "
                f"callbacks.guards.halve_batch=true do the former when it is needed. {str(error).splitlines()[0]}"
            )
        ledger.write_status(run_dir, "failed", " ".join(str(error).split())[:500])
        raise error


@user_errors
def _build(cfg: DictConfig, run_dir: Path) -> tuple[str, Any, Any, dict]:
    """(model name, data module, task, resolved configuration); nothing is written to the run folder."""
    data, plain = _build_data(cfg)
    model = build_model(plain["model"])
    if plain.get("init_from") and not (run_dir / "config.yaml").exists():  # a resumed run has weights of its own
        print(start_from(model, plain["init_from"]), flush=True)
    if plain.get("grad_checkpointing"):
        if not hasattr(model, "set_grad_checkpointing"):
            raise UserError(f"grad_checkpointing=true: {type(model).__name__} has no set_grad_checkpointing()")
        model.set_grad_checkpointing(True)
    if plain.get("compile"):
        model.compile()
    steps = _total_steps(plain["trainer"], data)
    factory = functools.partial(optim.build, total_steps=steps, **plain["optim"])
    factory(model)  # a wrong optimiser setting must not wait for the first step
    task = configuration.build_node(plain["task"], "ssmzoo.tasks.", model=model, optim=factory)
    return plain.get("model_name", type(model).__name__), data, task, plain


def _build_data(cfg: DictConfig) -> tuple[Any, dict]:
    """(data module, configuration resolved with its sizes), after everything has been checked."""
    import lightning as L

    configuration.check(cfg)
    L.seed_everything(int(cfg.seed), workers=True, verbose=False)
    data = configuration.build_node(OmegaConf.to_container(cfg.data, resolve=True), "ssmzoo.data.")
    data.prepare_data()
    data.setup("fit")
    configuration.set_sizes(data.sizes)
    plain = OmegaConf.to_container(cfg, resolve=True)
    lacking = [k for k, v in plain["model"].items() if isinstance(v, str) and v.startswith("<") and v.endswith("data>")]
    if lacking:
        raise UserError(
            f"the model needs {', '.join(lacking)} from the data, but {type(data).__name__} has only "
            f"{', '.join(data.sizes)}; choose the data and the task that belong together "
            f"(`ssmzoo list models`, `ssmzoo list data`), or give model.{lacking[0]}=... yourself"
        )
    return data, plain


def _total_steps(trainer: dict, data) -> int:
    """Optimiser steps of the whole run, for schedules; from the loader's length when only epochs are given."""
    if (trainer.get("max_steps") or -1) > 0:
        return trainer["max_steps"]
    epochs = trainer.get("max_epochs")
    if not epochs or epochs < 0:
        raise UserError(
            "trainer.max_steps or trainer.max_epochs must be positive: the learning-rate schedule needs an end"
        )
    batches = len(data.train_dataloader())
    if isinstance(trainer.get("limit_train_batches"), int):
        batches = min(batches, trainer["limit_train_batches"])
    return epochs * math.ceil(batches / trainer.get("accumulate_grad_batches", 1))


@user_errors
def _trainer(plain: dict, run_dir: Path, task, data, model_name: str):
    """Lightning's Trainer with our callbacks, loggers and checkpoint format."""
    import lightning as L

    settings = {k: v for k, v in plain["trainer"].items() if v is not None or k == "check_val_every_n_epoch"}
    if settings.get("precision") == "auto":
        bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported() and settings.get("accelerator") != "cpu"
        settings["precision"] = "bf16-mixed" if bf16 else "32-true"
    if settings.get("strategy") == "fsdp":
        from ssmzoo.train.sharded import Sharded

        settings["strategy"] = Sharded()
    wanted, limit = plain["callbacks"], settings.pop("max_time", None)
    checkpointer = Checkpointer(run_dir / "checkpoints", task.monitor, task.mode, **(wanted.get("checkpoint") or {}))
    signals = StopOnSignal(checkpointer)
    callbacks: list[Any] = [RandomStates(), Guards(run_dir, **(wanted.get("guards") or {}))]
    if wanted.get("watchdog"):
        callbacks.append(Watchdog(run_dir, **wanted["watchdog"]))
    if wanted.get("profile"):
        from ssmzoo.train.profile import Profile

        callbacks.append(Profile(run_dir, **wanted["profile"]))
    if wanted.get("ema"):
        from lightning.pytorch.callbacks import EMAWeightAveraging

        callbacks.append(EMAWeightAveraging(**wanted["ema"]))
    if wanted.get("early_stopping"):
        from lightning.pytorch.callbacks import EarlyStopping

        callbacks.append(EarlyStopping(monitor=f"val/{task.monitor}", mode=task.mode, **wanted["early_stopping"]))
    callbacks += [Progress(**(wanted.get("progress") or {}))]
    if limit is not None:
        callbacks.append(TimeLimit(limit))
    callbacks += [checkpointer, signals]
    settings.setdefault("profiler", NoProfiler())
    trainer = L.Trainer(
        **settings,
        callbacks=callbacks,
        default_root_dir=str(run_dir),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        logger=_loggers(plain, run_dir, model_name),
        plugins=[FolderCheckpointIO(lambda: _manifest(plain, model_name, trainer, data))],
    )
    return trainer, checkpointer, signals


def _loggers(plain: dict, run_dir: Path, model_name: str) -> list:
    chosen = dict(plain.get("logger") or {"kind": "csv"})
    kind = chosen.pop("kind", "csv")
    loggers: list[Any] = [CSVFile(run_dir / "metrics.csv")]
    if kind == "wandb":
        loggers.append(wandb_logger(run_dir, name=f"{model_name}/{run_dir.name}", **chosen))
        loggers[-1].experiment.config.update(plain, allow_val_change=True)
    elif kind == "tensorboard":
        loggers.append(tensorboard_logger(run_dir, **chosen))
    elif kind != "csv":
        raise UserError(f"logger.kind is {kind!r}; choose csv, wandb or tensorboard")
    return loggers


def _manifest(plain: dict, model_name: str, trainer, data) -> dict[str, Any]:
    metrics = {k: float(v) for k, v in trainer.callback_metrics.items()}
    content = {
        "model": model_name,
        "config": plain,
        "versions": _versions(),
        "git_commit": _git_commit(),
        "data": data.describe() if hasattr(data, "describe") else {},
        "metrics": metrics,
    }
    tokenizer = getattr(data, "tokenizer", None)
    return content | ({"tokenizer": tokenizer.to_dict()} if tokenizer is not None else {})


@functools.cache
def _versions() -> dict[str, str]:
    import ssmzoo

    found = {"ssmzoo": ssmzoo.__version__, "python": sys.version.split()[0]}
    return found | {name: importlib.metadata.version(name) for name in ("torch", "lightning", "hydra-core", "numpy")}


@functools.cache
def _git_commit() -> str | None:
    here = Path(__file__).resolve().parent
    result = (
        subprocess.run(["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
        if os.environ.get("PATH")
        else None
    )
    return result.stdout.strip() if result is not None and result.returncode == 0 else None


def _finish(plain: dict, run_dir: Path, model_name: str, trainer, task, data, seconds: float) -> float:
    """Evaluate the best weights, print and write the report; returns the monitored value."""
    progress = next(c for c in trainer.callbacks if isinstance(c, Progress))
    rate = progress.throughput(trainer, task)
    task.model = build_model(plain["model"])  # the trained one may be in shards
    task.model.load_state_dict(read_weights(run_dir))
    validation = evaluate_task(task, data, plain)
    report = task.report(run_dir, validation)
    total, active = count_parameters(task.model)
    rows = report.rows | {
        "parameters": f"{total:,}" + (f" ({active:,} active per token)" if active != total else ""),
        f"{task.unit} seen": f"{task.seen * trainer.world_size:,}",
        f"{task.unit}/s in training": f"{rate:,.0f}",
        "steps": f"{trainer.global_step:,}",
        "time": clock(seconds),
    }
    curves = draw_curves(
        run_dir / "metrics.csv", run_dir / "curves.png", task.monitor, f"{model_name}, seed {plain['seed']}"
    )
    figures = ([curves] if curves else []) + report.figures
    write_report(run_dir, f"{model_name}: {run_dir.name}", shlex.join(sys.argv), rows, report.texts, figures)
    print("\n" + table(rows))
    for name, body in report.texts.items():
        print(f"\n{name}\n{body}")
    print(f"\nrun folder: {run_dir}")
    return validation.get(task.monitor, float("nan"))


def evaluate_task(task, data, plain: dict) -> dict[str, float]:
    """Validation means of a task with the weights it has now, in a loop that writes nothing."""
    import lightning as L

    settings = {
        k: v for k, v in plain["trainer"].items() if k in ("accelerator", "limit_val_batches") and v is not None
    }
    trainer = L.Trainer(
        **settings,
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    found = trainer.validate(task, datamodule=data, verbose=False)[0]
    return {k.removeprefix("val/"): v for k, v in found.items()}


def count_parameters(model) -> tuple[int, int]:
    """(all, active per token): the two differ for mixtures of experts, which say so by `num_parameters()`."""
    if hasattr(model, "num_parameters"):
        return model.num_parameters()
    total = sum(p.numel() for p in model.parameters())
    return total, total


def evaluate(cfg: DictConfig) -> float:
    """`eval.py`: validation of a checkpoint, then what the task adds (longer contexts, every length, ...)."""
    _quiet()
    folder, plain, data, task, out = _build_evaluation(cfg)
    validation = evaluate_task(task, data, plain)
    report = task.report(out, validation)
    more = task.evaluate(out, data)
    rows, texts = report.rows | more.rows, report.texts | more.texts
    write_report(out, f"evaluation of {folder}", shlex.join(sys.argv), rows, texts, report.figures + more.figures)
    print(table(rows))
    for name, body in texts.items():
        print(f"\n{name}\n{body}")
    print(f"\nwritten to {out}")
    return validation.get(task.monitor, float("nan"))


@user_errors
def _build_evaluation(cfg: DictConfig):
    import lightning as L

    folder = find_checkpoint(cfg.ckpt, prefer=cfg.which)
    manifest = read_manifest(folder)
    plain = OmegaConf.to_container(
        OmegaConf.merge(manifest["config"], {"data": cfg.data, "task": cfg.task}), resolve=True
    )
    configuration.check(OmegaConf.create(plain))
    L.seed_everything(int(plain["seed"] if cfg.seed is None else cfg.seed), workers=True, verbose=False)
    kind = configuration.locate(plain["data"]["_target_"], "ssmzoo.data.")
    if hasattr(kind, "for_evaluation"):  # a folder typed now may mean another argument than when training
        saved = OmegaConf.to_container(OmegaConf.create(manifest["config"]), resolve=True)["data"]
        plain["data"] = kind.for_evaluation(saved, OmegaConf.to_container(cfg.data, resolve=True) or {})
    if "tokenizer" in manifest and "tokenizer" in plain["data"]:  # the one it was trained with, not one learnt anew
        plain["data"] |= {"tokenizer": manifest["tokenizer"], "bpe_vocab_size": None}
    data = configuration.build_node(plain["data"], "ssmzoo.data.")
    data.prepare_data()
    data.setup("validate")
    for size, value in data.sizes.items():
        built_with = plain["model"].get(size)
        if isinstance(built_with, int) and built_with != value:
            raise UserError(
                f"the data has {size} = {value}, the checkpoint was trained with {built_with}: "
                f"use the tokenizer and data settings it was trained with"
            )
    model = build_model(plain["model"])
    model.load_state_dict(read_weights(folder))
    task = configuration.build_node(plain["task"], "ssmzoo.tasks.", model=model)
    default_out = (folder.parent.parent if folder.parent.name == "checkpoints" else folder) / "eval"
    out = Path(cfg.out) if cfg.out else default_out
    out.mkdir(parents=True, exist_ok=True)
    return folder, plain, data, task, out


def _quiet() -> None:
    """Lightning's hints about workers, devices and tips are not for the users of this loop."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning.*")
    warnings.filterwarnings("ignore", message=".*num_workers.*")
