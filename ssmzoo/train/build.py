"""From a checked configuration to objects: data, model, task, Lightning's Trainer with our callbacks and loggers."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf

from ssmzoo.checkpoint_files import read_weights
from ssmzoo.models.dense_network import DenseNetwork
from ssmzoo.presets import build_model
from ssmzoo.train import config as configuration
from ssmzoo.train import optim
from ssmzoo.train.callbacks import (
    EarlyStopping,
    NewSettings,
    RandomStates,
    StopOnSignal,
    TimeLimit,
)
from ssmzoo.train.checkpoint import FolderCheckpointIO
from ssmzoo.train.checkpointer import Checkpointer
from ssmzoo.train.errors import UserError, user_errors
from ssmzoo.train.finetune import prepare, tokenizer_of
from ssmzoo.train.guards import Guards
from ssmzoo.train.init_from import start_from, start_pretrained
from ssmzoo.train.logger import CSVFile
from ssmzoo.train.manifest import manifest
from ssmzoo.train.progress import NoProfiler, Progress
from ssmzoo.train.recomputation import set_recomputation
from ssmzoo.train.rows import Rows
from ssmzoo.train.tracking import tensorboard_logger, wandb_logger
from ssmzoo.train.watchdog import Watchdog


class Objects(NamedTuple):
    """What a run is made of; plain is the configuration with every size filled in."""

    model_name: str
    data: Any
    task: Any
    plain: dict[str, Any]


class Loop(NamedTuple):
    trainer: Any
    checkpointer: Checkpointer
    signals: StopOnSignal
    progress: Progress


@user_errors
def build(cfg: DictConfig, resuming: bool = False) -> Objects:
    """Everything but the Trainer; nothing is written to the run folder."""
    if not resuming:
        keep_tokenizer(cfg)
    data, plain = build_data(cfg)
    model = build_model(plain["model"])
    if plain.get("init_from") and not resuming:  # a resumed run has weights of its own
        classes = getattr(data, "classes", None)
        part = part_for(model, plain["init_from"])
        print(start_from(part, plain["init_from"], float(plain.get("upcycle", 0.5)), classes), flush=True)
    if plain.get("pretrained") and not resuming:
        part = model.backbone if isinstance(model, DenseNetwork) else model
        print(start_pretrained(part, plain["model_name"], plain["pretrained"]), flush=True)
    if said := prepare(model, plain.get("freeze"), plain.get("lora")):
        print(said, flush=True)
    if plain.get("grad_checkpointing"):
        set_recomputation(model, plain["grad_checkpointing"])
    if plain.get("compile"):
        model.compile()
    steps = total_steps(plain["trainer"], data)
    warn_of_warmup(steps, plain["optim"].get("warmup_steps", 0))
    factory = functools.partial(optim.build, total_steps=steps, **plain["optim"])
    factory(model)  # a wrong optimiser setting must not wait for the first step
    task = configuration.build_node(plain["task"], "ssmzoo.tasks.", model=model, optim=factory)
    task.check_data(data)
    return Objects(plain.get("model_name", type(model).__name__), data, task, plain)


def part_for(model, path: str):
    """What weights from a file go into: the model, or its backbone where they are those of a backbone."""
    if not isinstance(model, DenseNetwork) or set(read_weights(path)) & set(model.state_dict()):
        return model
    return model.backbone


def keep_tokenizer(cfg: DictConfig) -> None:
    """Set data.tokenizer to that of the weights a run starts from, unless it was typed."""
    if "tokenizer" not in cfg.data or "command line" in configuration.origin("data.tokenizer"):
        return
    found = tokenizer_of(cfg.get("init_from"), cfg.get("model_name"), cfg.get("pretrained"))
    if found is not None and found != cfg.data.tokenizer:
        print(f"data.tokenizer={found}, which the weights were trained with", flush=True)
        cfg.data.tokenizer = found


def build_data(cfg: DictConfig) -> tuple[Any, dict[str, Any]]:
    """(data module, configuration resolved with its sizes), after everything has been checked."""
    import lightning as L

    configuration.check(cfg)
    L.seed_everything(int(cfg.seed), workers=True, verbose=False)
    data = configuration.build_node(OmegaConf.to_container(cfg.data, resolve=True), "ssmzoo.data.")
    data.prepare_data()
    data.setup("fit")
    configuration.set_sizes(data.sizes)
    plain = OmegaConf.to_container(cfg, resolve=True)
    task = configuration.locate(plain["task"]["_target_"], "ssmzoo.tasks.")
    if hasattr(task, "network"):  # the model is a part of what is trained
        plain["model"] = task.network(plain["model"], plain["task"], data.sizes)
    lacking = [k for k, v in plain["model"].items() if isinstance(v, str) and v.startswith("<") and v.endswith("data>")]
    if lacking:
        raise UserError(
            f"the model needs {', '.join(lacking)} from the data, but {type(data).__name__} has only "
            f"{', '.join(data.sizes)}; choose the data and the task that belong together "
            f"(`ssmzoo list models`, `ssmzoo list data`), or give model.{lacking[0]}=... yourself"
        )
    return data, plain


def total_steps(trainer: dict[str, Any], data) -> int:
    """Optimiser steps of the whole run, for schedules; of epochs by the loader's length; the first limit counts."""
    most, epochs = trainer.get("max_steps") or -1, trainer.get("max_epochs") or -1
    if epochs < 0 and most > 0:
        return most
    if epochs < 0:
        raise UserError(
            "trainer.max_steps or trainer.max_epochs must be positive: the learning-rate schedule needs an end"
        )
    batches = len(data.train_dataloader())
    if isinstance(trainer.get("limit_train_batches"), int):
        batches = min(batches, trainer["limit_train_batches"])
    steps = epochs * math.ceil(batches / trainer.get("accumulate_grad_batches", 1))
    return min(steps, most) if most > 0 else steps


def warn_of_warmup(steps: int, warmup: float) -> None:
    """A run that ends while its rate still rises has learnt next to nothing."""
    if warmup > steps:
        print(
            f"warning: the learning rate rises for optim.warmup_steps={warmup:g} steps, the run has {steps}: it never "
            f"comes to its peak. optim.warmup_steps=0.1 is a tenth of any run",
            flush=True,
        )


@user_errors
def build_loop(run: Objects, run_dir: Path, resumed_at: int | None = None, new_optim: bool = False) -> Loop:
    """Lightning's Trainer with our callbacks, loggers and checkpoint format.

    resumed_at  the step that a run goes on from;  new_optim  its optimiser gets settings other than the saved ones
    """
    import lightning as L

    plain, task = run.plain, run.task
    settings = {k: v for k, v in plain["trainer"].items() if v is not None or k == "check_val_every_n_epoch"}
    if settings.get("precision") == "auto":
        bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported() and settings.get("accelerator") != "cpu"
        settings["precision"] = "bf16-mixed" if bf16 else "32-true"
    if settings.get("strategy") == "fsdp":
        from ssmzoo.train.sharded import Sharded

        settings["strategy"] = Sharded()
    limit = settings.pop("max_time", None)
    options = {k: v or {} for k, v in plain["callbacks"].items() if v is not None or k not in OPTIONAL}
    checkpointer = Checkpointer(run_dir / "checkpoints", task.monitor, task.mode, **options.get("checkpoint", {}))
    signals, progress = StopOnSignal(checkpointer), Progress(**options.get("progress", {}))
    callbacks: list[Any] = [RandomStates(), Guards(run_dir, **options.get("guards", {}))]
    callbacks += [NewSettings()] if new_optim else []
    callbacks += optional_callbacks(options, run_dir, task)
    callbacks += [progress, Rows(run_dir)]
    callbacks += [TimeLimit(limit)] if limit is not None else []
    trainer = L.Trainer(
        **({"profiler": NoProfiler()} | settings),
        callbacks=[*callbacks, checkpointer, signals],
        default_root_dir=str(run_dir),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        logger=build_loggers(plain, run_dir, run.model_name, resumed_at),
        plugins=[FolderCheckpointIO(lambda: manifest(run, trainer))],
    )
    return Loop(trainer, checkpointer, signals, progress)


OPTIONAL = ("watchdog", "profile", "ema", "early_stopping")  # null leaves them out


def optional_callbacks(options: dict[str, dict], run_dir: Path, task) -> list[Any]:
    found: list[Any] = []
    if options.get("watchdog"):
        found.append(Watchdog(run_dir, **options["watchdog"]))
    if options.get("profile"):
        from ssmzoo.train.profile import Profile

        found.append(Profile(run_dir, **options["profile"]))
    if options.get("ema"):
        from lightning.pytorch.callbacks import EMAWeightAveraging

        found.append(EMAWeightAveraging(**options["ema"]))
    if options.get("early_stopping"):
        found.append(EarlyStopping(monitor=f"val/{task.monitor}", mode=task.mode, **options["early_stopping"]))
    return found


def build_loggers(plain: dict[str, Any], run_dir: Path, model_name: str, resumed_at: int | None) -> list[Any]:
    chosen = dict(plain.get("logger") or {"kind": "csv"})
    kind = chosen.pop("kind", "csv")
    loggers: list[Any] = [CSVFile(run_dir / "metrics.csv")]
    if kind == "wandb":
        classes = [str(plain[node]["_target_"]).rpartition(".")[2] for node in ("task", "data")]
        chosen["tags"] = chosen.get("tags") or [model_name, *classes]
        chosen["group"] = chosen.get("group") or sweep_name(plain, run_dir)
        loggers.append(wandb_logger(run_dir, name=f"{model_name}/{run_dir.name}", **chosen))
        loggers[-1].experiment.config.update(plain, allow_val_change=True)
    elif kind == "tensorboard":
        loggers.append(tensorboard_logger(run_dir, resumed_at))
    elif kind != "csv":
        raise UserError(f"logger.kind is {kind!r}; choose csv, wandb or tensorboard")
    return loggers


def sweep_name(plain: dict[str, Any], run_dir: Path) -> str | None:
    """What the runs of a sweep have in common; None for a run of its own."""
    name = str(plain.get("name"))
    number = run_dir.name.removeprefix(f"{name}-")
    return name if number != run_dir.name and number.isdigit() else None
