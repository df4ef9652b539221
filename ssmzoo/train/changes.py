"""What may be typed anew when a run is continued: applied where that can be, refused in a line where it cannot."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ssmzoo.presets import config_dir
from ssmzoo.safe_yaml import read_yaml
from ssmzoo.train.errors import UserError

WEIGHTS = "the weights were made with it"
ORDER = "which sample comes next follows from it"
STATE = "the optimiser's state belongs to it"

RULES: dict[str, str | None] = {  # the first pattern that fits a key: why it is fixed, or None where a change applies
    "seed": "random states and the order of the data follow from it",
    "init_from": "a continued run has weights of its own",
    "upcycle": "a continued run has weights of its own",
    "freeze": STATE,
    "lora": WEIGHTS,
    "lora.*": WEIGHTS,
    "pretrained": "a continued run has weights of its own",
    "model_name": WEIGHTS,
    "model.*": WEIGHTS,
    "compile": None,
    "grad_checkpointing": None,
    "task._target_": WEIGHTS,
    "task.*": None,
    "data.batch_size": None,
    "data.num_workers": None,
    "data.path": None,  # moved to another disk
    "data.val_path": None,
    "data.cache_dir": None,
    "data.val_*": None,
    "data.test_*": None,
    "data.*": ORDER,
    "optim.name": STATE,
    "optim.decay": STATE,  # groups of parameters follow from these three
    "optim.layer_decay": STATE,
    "optim.lr_scale": STATE,
    "optim.*": None,
    "trainer.*": None,
    "logger.*": None,
    "callbacks.ema": "the average began with the run",
    "callbacks.ema.*": "the average began with the run",
    "callbacks.*": None,
}
NODES = ("model", "task", "data", "optim", "trainer", "logger", "callbacks")
NOT_OF_THE_RUN = ("resume", "config", "name", "runs_dir", "n_trials")


def rule(key: str) -> str | None:
    """Why a key is fixed once a run has begun; None when a change applies. KeyError for a key that no rule knows."""
    for pattern, reason in RULES.items():
        if fnmatch.fnmatchcase(key, pattern):
            return reason
    raise KeyError(key)


def flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    """{"a.b": value} of nested tables; an empty table is a value."""
    if not isinstance(node, dict) or not node:
        return {prefix: node}
    return {k: v for key, value in node.items() for k, v in flatten(value, f"{prefix}.{key}".lstrip(".")).items()}


def typed_keys(overrides: Sequence[str], choices: dict[str, Any]) -> list[str]:
    """Keys and tables (optim.lr, callbacks.ema) that a command line speaks of; a chosen file speaks of its own."""
    found = []
    for override in overrides:
        key = override.lstrip("+~").split("=")[0].split("@")[0].strip()
        if key.startswith("hydra") or key in NOT_OF_THE_RUN:
            continue
        file = config_dir() / key / f"{choices.get(key)}.yaml"
        if "." not in key and key in choices:
            found += _keys_of(file, key) if file.exists() else []
        else:
            found.append(key)
    return found


def _keys_of(file: Path, group: str) -> list[str]:
    content = read_yaml(file) or {}
    whole = "@package _global_" in file.read_text(encoding="utf-8")
    others = ("defaults", "hydra", *NOT_OF_THE_RUN) if whole else ("defaults",)
    body = {k: v for k, v in content.items() if k not in others}
    return list(flatten(body if whole else {group: body})) if body else []


def changed(cfg: DictConfig, saved: dict[str, Any], keys: Sequence[str]) -> dict[str, tuple[Any, Any]]:
    """{key: (saved, typed)} of what the command line says otherwise than the run."""
    found = {}
    old = flatten(saved)
    for key in keys:
        typed = OmegaConf.select(cfg, key, throw_on_missing=False)
        typed = OmegaConf.to_container(typed, resolve=False) if OmegaConf.is_config(typed) else typed
        for leaf, value in flatten(typed, key).items():
            before = old.get(leaf, _select(saved, leaf))
            follows = isinstance(value, str) and ("${" in value or value.endswith(" of the data>"))  # as it did
            if not follows and not _equal(before, value):
                found[leaf] = (before, value)
    return found


def _select(node: Any, key: str) -> Any:
    for part in key.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return node


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_equal, a, b))
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def refuse_fixed(found: dict[str, tuple[Any, Any]], run_dir: Path) -> None:
    """Raise UserError, in one line, for changes that a begun run cannot take."""
    fixed: dict[str, list[str]] = {}
    for key, (before, now) in found.items():
        try:
            reason = rule(key)
        except KeyError:
            continue  # no key of ours: the check of the whole configuration says so, with the nearest one
        if reason is not None:
            fixed.setdefault(reason, []).append(f"{key}={now} (was {before})")
    if fixed:
        named = "; ".join(f"{', '.join(keys)}: {reason}" for reason, keys in fixed.items())
        raise UserError(
            f"resume={run_dir} cannot change {named}. Leave it out, or start a new run from these weights with "
            f"init_from={run_dir}"
        )
