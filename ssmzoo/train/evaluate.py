"""`eval.py`: a trained model on its own data or on other data for its task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ssmzoo.checkpoint_files import find_checkpoint, read_manifest, read_weights
from ssmzoo.suggest import nearest
from ssmzoo.train import config as configuration
from ssmzoo.train.errors import UserError, user_errors
from ssmzoo.train.quiet import quiet
from ssmzoo.train.report import show, typed, write_report
from ssmzoo.zoo import build_recorded

KEYS = ("ckpt", "which", "data", "task", "out", "seed")


def evaluate(cfg: DictConfig) -> float:
    """Validation of a checkpoint, then what the task adds (longer contexts, every length, ...)."""
    quiet()
    folder, plain, data, task, out = build_evaluation(cfg)
    validation = evaluate_task(task, data, plain["trainer"])
    report = task.report(out, validation)
    more = task.evaluate(out, data)
    rows, texts = report.rows | more.rows, report.texts | more.texts
    write_report(out, f"evaluation of {folder}", typed(), rows, texts, report.figures + more.figures)
    show(rows, texts)
    print(f"\nwritten to {out}")
    return validation.get(task.monitor, float("nan"))


def evaluate_task(task, data, trainer: dict[str, Any]) -> dict[str, float]:
    """Validation means of a task with the weights it has now, in a loop that writes nothing.

    A run that was never validated (limit_val_batches=0) is, here, on all of the data.
    """
    import lightning as L

    settings = {k: v for k, v in trainer.items() if k in ("accelerator", "limit_val_batches") and v not in (None, 0)}
    L.Trainer(
        **settings,
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    ).validate(task, datamodule=data, verbose=False)
    return {k.removeprefix("val/"): v for k, v in task.validation.items()}


@user_errors
def build_evaluation(cfg: DictConfig) -> tuple[Path, dict[str, Any], Any, Any, Path]:
    """(checkpoint, configuration, data module, task with the weights, folder for results)"""
    import lightning as L

    for key in cfg:
        if key not in KEYS:
            raise UserError(
                f"{key} is nothing that an evaluation takes{nearest(key, KEYS)}; it takes {', '.join(KEYS)}"
            )
    if cfg.which not in ("best", "last"):
        raise UserError(f"which={cfg.which}: choose best or last")
    folder = find_checkpoint(cfg.ckpt, prefer=cfg.which)
    manifest = read_manifest(folder)
    saved = configuration.plain_config(manifest.get("config"), f"the configuration of {folder}")
    typed = OmegaConf.to_container(OmegaConf.create({"data": cfg.data, "task": cfg.task}), resolve=True)
    plain = OmegaConf.to_container(OmegaConf.merge(saved, typed), resolve=True)
    configuration.plain_config(plain, "the configuration")
    configuration.check(OmegaConf.create(plain))
    L.seed_everything(int(plain["seed"] if cfg.seed is None else cfg.seed), workers=True, verbose=False)
    kind = configuration.locate(plain["data"]["_target_"], "ssmzoo.data.")
    if hasattr(kind, "for_evaluation"):  # a folder typed now may mean another argument than when training
        plain["data"] = kind.for_evaluation(saved["data"], typed["data"] or {})
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
    model = build_recorded(manifest, plain["model"])
    model.load_state_dict(read_weights(folder))
    task = configuration.build_node(plain["task"], "ssmzoo.tasks.", model=model)
    default_out = (folder.parent.parent if folder.parent.name == "checkpoints" else folder) / "eval"
    out = Path(cfg.out) if cfg.out else default_out
    out.mkdir(parents=True, exist_ok=True)
    return folder, plain, data, task, out
