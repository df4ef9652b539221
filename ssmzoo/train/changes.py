"""What may be typed anew when a run is continued: applied where that can be, refused in a line where it cannot."""

from __future__ import annotations

import csv
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
    **dict.fromkeys(
        (
            f"task.{k}"
            for k in (
                "head",
                "channels",
                "auxiliary",
                "out_indices",
                "tap",
                "min_stride",
                "extra_levels",
                "anchor_scale",
            )
        ),
        WEIGHTS,
    ),
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
SEEN_ONLY = (  # what applies and leaves the numbers as they would have been
    "logger.*",
    "data.num_workers",
    "data.cache_dir",
    "data.*path",
    "trainer.log_every_n_steps",
    "callbacks.progress.*",
    "callbacks.watchdog.*",
    "callbacks.profile*",
    "callbacks.checkpoint.*",
)
HISTORY = "resumed.csv"  # in a run folder: step, key, before, after of every change that applied
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


def typed_keys(overrides: Sequence[str], choices: dict[str, Any], model: str | None = None) -> list[str]:
    """Keys and tables (optim.lr, callbacks.ema) that a command line speaks of; a chosen file speaks of its own.

    model  the run's own, whose file says nothing new when a chosen one names it
    """
    found = []
    for override in overrides:
        key = override.lstrip("+~").split("=")[0].split("@")[0].strip()
        if key.startswith("hydra") or key in NOT_OF_THE_RUN:
            continue
        file = config_dir() / key / f"{choices.get(key)}.yaml"
        if "." not in key and key in choices:
            found += _keys_of(file, key, model) if file.exists() else []
        else:
            found.append(key)
    return found


def _keys_of(file: Path, group: str, model: str | None) -> list[str]:
    """Those of a file; of a recipe (an experiment) also those of the files that it chooses or inherits from."""
    content = read_yaml(file) or {}
    whole = "@package _global_" in file.read_text(encoding="utf-8")
    others = ("defaults", "hydra", *NOT_OF_THE_RUN) if whole else ("defaults",)
    body = {k: v for k, v in content.items() if k not in others}
    found = list(flatten(body if whole else {group: body})) if body else []
    for entry in content.get("defaults", []) if whole and group != "model" else []:
        pair = entry.items() if isinstance(entry, dict) else [(group, entry)] if entry != "_self_" else []
        for key, name in pair:
            other = str(key).removeprefix("override ").strip().strip("/").split("@")[0]
            above = config_dir() / other / f"{str(name).removeprefix(f'/{other}/')}.yaml"
            if (other, name) != ("model", model) and above.exists():
                found += _keys_of(above, other, model)
    return found


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


def note(run_dir: Path, step: int, found: dict[str, tuple[Any, Any]]) -> None:
    """Add the changes that a resume made to the run's history."""
    file = run_dir / HISTORY
    new = not file.exists()
    with file.open("a", newline="", encoding="utf-8") as opened:
        rows = csv.writer(opened)
        rows.writerows([("step", "key", "before", "after")] * new)
        rows.writerows((step, key, before, after) for key, (before, after) in found.items())


def history(run_dir: Path) -> str:
    """What a run's resumes changed about its numbers, e.g. optim.lr=0.1 from step 200 (was 0.5); empty when nothing."""
    file = run_dir / HISTORY
    if not file.exists():
        return ""
    with file.open(newline="", encoding="utf-8") as opened:
        rows = [r for r in csv.DictReader(opened) if not any(fnmatch.fnmatchcase(str(r["key"]), p) for p in SEEN_ONLY)]
    return "; ".join(f"{r['key']}={r['after']} from step {r['step']} (was {r['before']})" for r in rows)


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
