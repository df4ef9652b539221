"""Models by name, without weights. The files of configs/model are the only list there is: a new file is a new model."""

from __future__ import annotations

import copy
import fnmatch
import functools
import importlib
import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ssmzoo.moved import MODULES
from ssmzoo.suggest import nearest

if TYPE_CHECKING:  # names are listed, and completed in a shell, without loading torch
    from torch import nn


@functools.cache
def config_dir() -> Path:
    """The configs folder: inside the package when installed from a wheel, beside it in a checkout."""
    here = Path(__file__).parent
    return here / "configs" if (here / "configs").is_dir() else here.parent / "configs"


def config_names(group: str) -> list[str]:
    """Names that may be chosen in a config group, nested ones as `folder/name`."""
    root = config_dir() / group
    found = (os.path.relpath(os.path.join(folder, f), root) for folder, _, files in os.walk(root) for f in files)
    return sorted(name.removesuffix(".yaml").replace(os.sep, "/") for name in found if name.endswith(".yaml"))


@functools.cache
def describe_config(group: str, name: str) -> str:
    """The first comment line of a config that is not a package directive."""
    for line in (config_dir() / group / f"{name}.yaml").read_text(encoding="utf-8").splitlines():
        if line.startswith("#") and "@package" not in line:
            return line.lstrip("# ").rstrip()
    return ""


def read_model_config(name: str) -> dict:
    """{"model": constructor arguments with `_target_`, "task": ..., "data": ...} of configs/model/<name>.yaml.

    Inheritance between model files (a plain name in `defaults`) is followed. Raises ValueError for an unknown name.
    """
    file = config_dir() / "model" / f"{name}.yaml"
    elsewhere = os.path.isabs(name) or name.startswith("..") or os.path.normpath(name) != name
    if elsewhere or not file.is_file():
        names = config_names("model")
        raise ValueError(f"unknown model {name!r}{nearest(name, names)}; `ssmzoo list models` prints all {len(names)}")
    content = copy.deepcopy(_parsed(file, file.stat().st_mtime_ns))
    result: dict = {"model": {}}
    for entry in content.get("defaults", []):
        if isinstance(entry, str) and entry != "_self_":
            parent = read_model_config(entry)
            result = parent | result | {"model": parent["model"] | result["model"]}
        elif isinstance(entry, dict):
            for key, value in entry.items():
                result[key.removeprefix("override ").strip().strip("/").split("@")[0]] = value
    result["model"] = result["model"] | content.get("model", {})
    return result


@functools.cache
def _parsed(file: Path, changed: int) -> dict:
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's, five times as fast
    return yaml.load(file.read_text(encoding="utf-8"), loader) or {}


def list_models(pattern: str = "*", task: str | None = None) -> list[str]:
    """Names of the zoo's models and presets, filtered by a glob and by the task they call home."""
    names = [n for n in config_names("model") if fnmatch.fnmatch(n, pattern)]
    return names if task is None else [n for n in names if read_model_config(n).get("task") == task]


def model_class(target: str) -> type[nn.Module]:
    """The class a config names. Only classes of `ssmzoo.models` are accepted, so that a config cannot run others."""
    from torch import nn

    module, _, name = str(target).rpartition(".")
    module = MODULES.get(module, module)  # what earlier checkpoints call it
    if not module.startswith("ssmzoo.models."):
        raise ValueError(f"model._target_ is {target!r}: only classes inside ssmzoo.models can be built")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"model._target_ is {target!r}, which cannot be imported: {error}") from None
    if not (inspect.isclass(found) and issubclass(found, nn.Module) and found.__module__.startswith("ssmzoo.")):
        raise ValueError(f"model._target_ is {target!r}, which is no model of ssmzoo")
    return found


def build_model(node: dict) -> nn.Module:
    """Instantiate `{"_target_": ..., **arguments}`; TypeError names an unknown argument and the nearest known one."""
    node = as_now(node)
    arguments = {k: v for k, v in node.items() if k != "_target_"}
    cls = model_class(node["_target_"])
    known = [p for p in inspect.signature(cls).parameters]
    for key in arguments:
        if key not in known and key not in getattr(cls, "old_arguments", ()):
            raise TypeError(
                f"{cls.__name__} takes no argument {key!r}{nearest(key, known)}; it takes {', '.join(known)}"
            )
    return cls(**arguments)


def as_now(node: dict) -> dict:
    """A node of an earlier release: `ssm_cfg.scenario` of Mamba became a model of its own."""
    mixer = node.get("ssm_cfg")
    is_mamba = node["_target_"] == "ssmzoo.models.mamba.MambaLM"
    if not is_mamba or not isinstance(mixer, Mapping) or "scenario" not in mixer:
        return node
    mixer = dict(mixer)
    scenario = mixer.pop("scenario")
    if scenario is None:
        return node | {"ssm_cfg": mixer}
    return node | {"_target_": "ssmzoo.models.token_dynamics.ScenarioMambaLM", "ssm_cfg": mixer, "scenario": scenario}


def build_preset(name: str, **overrides) -> nn.Module:
    """The model of configs/model/<name>.yaml with fresh weights; `overrides` replace its constructor arguments.

    Sizes that a data set decides when training (vocab_size, num_classes) take the constructor's default unless given.
    Raises ValueError for an unknown name, TypeError for an unknown argument.
    """
    node = read_model_config(name)["model"]
    node = {k: v for k, v in node.items() if not (isinstance(v, str) and v.startswith("${"))}
    return build_model(node | overrides)
