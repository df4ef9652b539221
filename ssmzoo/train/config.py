"""From a command line to a checked configuration: overrides, unknown keys, wrong types, sizes that the data decides."""

from __future__ import annotations

import functools
import importlib
import inspect
import re
import typing
from collections import abc
from collections.abc import Callable, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ssmzoo.presets import config_dir, config_names, model_class
from ssmzoo.safe_yaml import read_yaml
from ssmzoo.suggest import nearest
from ssmzoo.train import changes, sweep
from ssmzoo.train.ranges import out_of_range


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names the key, the value and the nearest valid choice."""


_sizes: dict[str, int] = {}


def _size(name: str):
    return _sizes.get(name, f"<{name} of the data>")


def register_resolvers() -> None:
    """`${sizes:vocab_size}`: a number the data module knows, filled in when it has been set up."""
    OmegaConf.register_new_resolver("sizes", _size, replace=True)
    OmegaConf.register_new_resolver("trials_left", sweep.trials_left, replace=True)
    OmegaConf.register_new_resolver("search_seed", sweep.search_seed, replace=True)


def set_sizes(sizes: dict[str, int]) -> None:
    _sizes.clear()
    _sizes.update(sizes)


CALLED = {  # config node -> what its keys are arguments of, when the node has no _target_
    "optim": "ssmzoo.train.optim.build",
    "trainer": "lightning.pytorch.Trainer",
    "lora": "ssmzoo.adapt.lora.add_lora",
    "callbacks.checkpoint": "ssmzoo.train.checkpointer.Checkpointer",
    "callbacks.guards": "ssmzoo.train.guards.Guards",
    "callbacks.watchdog": "ssmzoo.train.watchdog.Watchdog",
    "callbacks.profile": "ssmzoo.train.profile.Profile",
    "callbacks.progress": "ssmzoo.train.progress.Progress",
    "callbacks.ema": "lightning.pytorch.callbacks.EMAWeightAveraging",
    "callbacks.early_stopping": "lightning.pytorch.callbacks.EarlyStopping",
}
LOGGER_KEYS = {"csv": (), "wandb": ("project", "mode", "entity", "group", "tags"), "tensorboard": ()}
TOP_LEVEL = (
    "seed",
    "runs_dir",
    "name",
    "resume",
    "config",
    "init_from",
    "upcycle",
    "pretrained",
    "freeze",
    "lora",
    "compile",
    "grad_checkpointing",
    "model_name",
    "n_trials",
)
FREE_ROOTS = ("model", "task", "data", "optim", "trainer", "logger", "callbacks", "lora")


def plain_config(content: Any, what: str) -> dict[str, Any]:
    """A configuration from a file that may be a stranger's: plain containers, in which nothing is resolved.

    Ours are saved resolved. Raises ConfigError, naming the key and not its value, for a `${...}` (it could ask for
    environment variables) and for a `_target_` anywhere but in model, task and data.
    """
    if not isinstance(content, dict):
        raise ConfigError(f"{what} does not hold a table of keys")
    for key, value in changes.flatten(content).items():
        if isinstance(value, (list, tuple)) and any(isinstance(v, (dict, list)) for v in value):
            plain_config({str(i): v for i, v in enumerate(value)}, f"{what}, {key}")
        if "${" in f"{key}{value}" and not re.fullmatch(r"\$\{sizes:\w+\}", str(value)):
            raise ConfigError(f"{what}: {key} holds a ${{...}}, which is not resolved in files of others: refused")
        node, _, last = key.rpartition(".")
        if last == "_target_" and node not in ("model", "model.backbone", "task", "data"):
            raise ConfigError(f"{what}: {key} is refused: only model, task and data name a class")
    return content


def locate(target: str, prefix: str = "ssmzoo.") -> Callable:
    """The class that the `_target_` of a data module or task names, or the callable behind a config node of CALLED.

    A class must be of the kind expected there (a LightningDataModule in ssmzoo.data, a Task in ssmzoo.tasks): a
    configuration runs nothing else of the package.
    """
    module, _, name = str(target).rpartition(".")
    known = target in CALLED.values()
    kinds = {k: v for k, v in BASES.items() if k.startswith(prefix) and module.startswith(k)}
    if not (kinds or known and prefix == "ssmzoo."):
        raise ConfigError(f"_target_ {target!r} is refused: it must lie inside {prefix.rstrip('.')}")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"_target_ {target!r} cannot be imported: {error}") from None
    if known:
        return found
    kind = _class_at(next(iter(kinds.values())))
    if not (inspect.isclass(found) and issubclass(found, kind) and found.__module__.startswith("ssmzoo.")):
        raise ConfigError(f"_target_ {target!r} is refused: it is not a {kind.__name__} of ssmzoo")
    return found


BASES = {"ssmzoo.data.": "lightning.pytorch.LightningDataModule", "ssmzoo.tasks.": "ssmzoo.tasks.base.Task"}


def _class_at(path: str) -> type:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def build_node(node: dict, prefix: str, **injected):
    """Instantiate `{"_target_": ..., **arguments}`; the arguments are plain, and the class is of `prefix`'s kind."""
    plain_config({prefix.split(".")[1].replace("tasks", "task"): node}, "the configuration")
    arguments = {k: v for k, v in node.items() if k != "_target_"}
    return locate(node["_target_"], prefix)(**arguments, **injected)


def free_overrides(arguments: Sequence[str]) -> list[str]:
    """Let `model.n_experts=8` set an argument that the yaml leaves at its default: the constructor is the schema, so
    such keys are added (`++`) and checked against the constructor afterwards."""
    nameless = next((a for a in arguments if "=" in a and not a.partition("=")[0].strip("+~ ")), None)
    if nameless is not None:
        raise ConfigError(f"{nameless!r} has no key; expected key=value")
    for key, _, value in (a.lstrip("+").partition("=") for a in arguments):
        if key in FREE_ROOTS and key != "lora" and value.strip() in ("null", "''", '""'):
            names = config_names(key)
            more = f"choose one of {', '.join(names)}" if len(names) <= 12 else f"see `ssmzoo list {plural(key)}`"
            raise ConfigError(f"{key}={value} chooses no file; {more}")
    pattern = re.compile(rf"^({'|'.join(FREE_ROOTS)})\.[\w.]+=")
    return [f"++{a}" if pattern.match(a) else a for a in arguments]


def paired_overrides(arguments: Sequence[str]) -> list[str]:
    """Let `data=mqar` choose its task where none is typed, and `task=segmentation` its data: data classes may name a
    `default_task`, tasks a `default_data`."""
    typed = dict(a.lstrip("+").split("=", 1) for a in arguments if "=" in a)
    if any(a.lstrip("~") in ("task", "data") for a in arguments) or ("task" in typed) == ("data" in typed):
        return list(arguments)
    given, other = ("data", "task") if "data" in typed else ("task", "data")
    if other == "data" and "experiment" in typed:  # which has data of its own
        return list(arguments)
    found = {_default_of(given, name) for name in typed[given].split(",")}
    return [*arguments, *(f"{other}={name}" for name in found if name is not None and len(found) == 1)]


def _default_of(group: str, name: str) -> str | None:
    """The task that the class of a file in configs/data names, or the data of one in configs/task; None without."""
    files = [config_dir() / group / f"{name}.yaml"]
    while files and files[-1].exists():
        content = read_yaml(files.pop()) or {}
        node = content.get(group, content)
        if "_target_" in node:
            return getattr(locate(node["_target_"]), {"data": "default_task", "task": "default_data"}[group], None)
        parents = [p for p in content.get("defaults", []) if isinstance(p, str) and p != "_self_"]
        files = [config_dir() / group / f"{parent}.yaml" for parent in parents[:1]]
    return None


NOT_TYPED = (  # arguments of Lightning's Trainer that are the loop's own affair
    *("callbacks", "logger", "plugins", "default_root_dir", "enable_checkpointing", "enable_progress_bar"),
    *("enable_model_summary", "use_distributed_sampler", "barebones", "model_registry"),
)


def check(cfg: DictConfig) -> None:
    """Raise ConfigError for a key that nothing takes or a value of the wrong type, before anything is built."""
    from ssmzoo.layers.decoder import RECOMPUTE

    for key in cfg:
        if key not in TOP_LEVEL + FREE_ROOTS:
            raise ConfigError(f"unknown key {key!r}{origin(str(key))}{nearest(key, TOP_LEVEL + FREE_ROOTS)}")
    if cfg.get("init_from") and cfg.get("pretrained"):
        raise ConfigError("init_from and pretrained both name weights to start from; give one of them")
    if not _fits(cfg.get("upcycle", 0.5), float) or not 0 <= cfg.get("upcycle", 0.5) <= 1:
        raise ConfigError(f"upcycle is {cfg.upcycle!r}{origin('upcycle')}; expected a share of hidden units, 0 to 1")
    if cfg.get("grad_checkpointing", False) not in RECOMPUTE:
        raise ConfigError(
            f"grad_checkpointing is {cfg.grad_checkpointing!r}{origin('grad_checkpointing')}; expected true (or full), "
            f"selective or false{nearest(str(cfg.grad_checkpointing), ['full', 'selective'])}"
        )
    for key, kind in (("seed", int), ("compile", bool)):
        if not _fits(cfg.get(key, kind()), kind):
            given = f"{cfg[key]!r} ({type(cfg[key]).__name__})"
            raise ConfigError(f"{key} is {given}{origin(key)}; expected {kind.__name__}")
    for key in ("init_from", "runs_dir"):  # what a shell leaves of an unset variable
        if cfg.get(key) is not None and not str(cfg[key]).strip():
            raise ConfigError(f"{key} is empty{origin(key)}; expected a path")
    _check_logger(cfg.get("logger") or {"kind": "csv"})
    if str(cfg.model.get("_target_", "")):
        _check_node("model", cfg.model, model_class(cfg.model._target_), injected=())
    for node, injected in (("task", ("model", "optim")), ("data", ())):
        if cfg.get(node) is None or "_target_" not in cfg[node]:
            raise ConfigError(f"{node} has no _target_; choose one of {', '.join(config_names(node))}")
        _check_node(node, cfg[node], locate(cfg[node]._target_), injected)
    injected = {
        "optim": ("model", "total_steps"),
        "lora": ("model",),
        "callbacks.checkpoint": ("folder", "monitor", "mode"),
        "callbacks.guards": ("run_dir",),
        "callbacks.profile": ("run_dir",),
        "callbacks.watchdog": ("run_dir",),
        "callbacks.early_stopping": ("monitor", "mode"),
        "trainer": NOT_TYPED,
    }
    for node, target in CALLED.items():
        value = OmegaConf.select(cfg, node)
        if value is not None:
            _check_node(node, value, locate(target), injected.get(node, ()))
    known = {n.split(".")[1] for n in CALLED if n.startswith("callbacks.")}
    for key in cfg.callbacks:
        if key not in known:
            raise ConfigError(
                f"unknown key callbacks.{key}{origin(f'callbacks.{key}')}{nearest(key, known)}; "
                f"known: {', '.join(sorted(known))}"
            )
    check_combinations(cfg)
    wrong = out_of_range(OmegaConf.to_container(cfg, resolve=False))
    if wrong is not None:
        key, value, expected = wrong
        raise ConfigError(f"{key} is {value}{origin(key)}; expected {expected}")


def _check_logger(logger) -> None:
    kind = logger.get("kind", "csv")
    if kind not in LOGGER_KEYS:
        raise ConfigError(f"logger.kind is {kind!r}; choose one of {', '.join(LOGGER_KEYS)}")
    for key in logger:
        if key != "kind" and key not in LOGGER_KEYS[kind]:
            raise ConfigError(
                f"unknown key logger.{key}{origin(f'logger.{key}')}{nearest(key, LOGGER_KEYS[kind])}; "
                f"logger={kind} takes {', '.join(LOGGER_KEYS[kind]) or 'no options'}"
            )


GROUPS = ("hparams_search", "debug", "experiment", "model", "data", "task", "callbacks", "logger", "trainer", "optim")
# of files, in the order in which they win over those behind


def origin(key: str) -> str:
    """Where a key such as optim.lr came from: what was typed, or the file that has it; empty when it is unknown."""
    from hydra.core.hydra_config import HydraConfig

    if not HydraConfig.initialized():
        return ""
    cfg = HydraConfig.get()
    for override in cfg.overrides.task:
        if override.lstrip("+").split("=")[0] == key:
            return f" (from {override.lstrip('+')!r} on the command line)"
    for group in GROUPS:
        file = _file_with(key.split("."), group, cfg.runtime.choices.get(group))
        if file:
            return f" (from {file})"
    return ""


def _file_with(path: list[str], group: str, name: str | None) -> str:
    """The file of a config group, or the one it inherits from, that sets a key; empty when none does."""
    file = config_dir() / group / f"{name}.yaml"
    if name is None or not file.exists():
        return ""
    text, content = file.read_text(encoding="utf-8"), read_yaml(file) or {}
    inside = path if "@package _global_" in text else path[1:] if path[0] == group else []
    if inside and _has(content, inside):
        return f"configs/{group}/{name}.yaml"
    for parent in reversed(content.get("defaults", [])):
        if isinstance(parent, str) and parent != "_self_":
            above = _file_with(path, group, parent.removeprefix(f"/{group}/"))
            if above:
                return above
    return ""


def _has(node: Any, path: list[str]) -> bool:
    return not path or (isinstance(node, dict) and path[0] in node and _has(node[path[0]], path[1:]))


def check_combinations(cfg: DictConfig) -> None:
    """Settings that are right one by one and cannot work together."""
    trainer, callbacks = cfg.trainer, cfg.callbacks
    sharded = trainer.get("strategy") == "fsdp"
    refused = [
        (
            sharded and cfg.optim.get("name") == "muon",
            "trainer.strategy=fsdp with optim.name=muon",
            "Muon needs whole matrices: use trainer=ddp or optim=adamw",
        ),
        (sharded and callbacks.get("ema"), "trainer.strategy=fsdp with callbacks.ema", "use trainer=ddp or no average"),
        (
            sharded and trainer.get("precision") in ("16-mixed", 16, "16"),
            "trainer.strategy=fsdp with 16-mixed",
            "use bf16-mixed or 32-true",
        ),
        (
            trainer.get("accelerator") == "cpu" and trainer.get("precision") in ("16-mixed", 16, "16"),
            "trainer.precision=16-mixed on a CPU",
            "use bf16-mixed or 32-true",
        ),
        (
            isinstance(trainer.get("val_check_interval"), float) and not trainer.get("check_val_every_n_epoch"),
            f"trainer.val_check_interval={trainer.get('val_check_interval')} without trainer.check_val_every_n_epoch",
            "a share of an epoch needs trainer.check_val_every_n_epoch=1; a whole number counts batches",
        ),
        (cfg.get("compile") and sharded, "compile=true with trainer.strategy=fsdp", "leave one of them out"),
        (cfg.get("resume") and cfg.get("config"), "resume= with config=", "one continues a run, the other repeats it"),
        (
            (callbacks.get("guards") or {}).get("halve_batch") and (trainer.get("devices") not in (1, "auto", None)),
            "callbacks.guards.halve_batch=true on several devices",
            "lower data.batch_size instead",
        ),
    ]
    for wrong, what, why in refused:
        if wrong:
            named = re.sub(r"(\w+\.[\w.]+)(=\S+)?", lambda found: found.group() + origin(found.group(1)), what)
            raise ConfigError(f"{named} cannot work: {why}")


def _check_node(node: str, value: DictConfig, called: Callable, injected: tuple[str, ...]) -> None:
    parameters = inspect.signature(called).parameters
    allowed = [p for p in parameters if p not in injected and p not in ("self", "kwargs", "args")]
    hints = _hints(called)
    for key, raw in OmegaConf.to_container(value, resolve=False).items():
        if key == "_target_":
            continue
        if key in getattr(called, "old_arguments", ()):  # accepted with a warning
            continue
        if key not in allowed:
            raise ConfigError(
                f"unknown key {node}.{key}{origin(f'{node}.{key}')}{nearest(key, allowed)}; "
                f"{getattr(called, '__name__', node)} takes "
                f"{', '.join(allowed)}"
            )
        if f"{node}.{key}" == "trainer.precision" and raw == "auto":  # ours, resolved when the trainer is made
            continue
        if key in hints and not (isinstance(raw, str) and "${" in raw) and not _fits(raw, hints[key]):
            came = origin(f"{node}.{key}")
            raise ConfigError(f"{node}.{key} is {raw!r} ({type(raw).__name__}){came}; expected {_name(hints[key])}")


@functools.cache
def _hints(called: Callable) -> dict[str, Any]:
    try:
        return typing.get_type_hints(called.__init__ if inspect.isclass(called) else called)
    except (NameError, TypeError, AttributeError):
        return {}


def _fits(value, hint) -> bool:
    """Is a plain config value acceptable for a type hint? Unknown hints accept everything."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is typing.Any or isinstance(hint, typing.TypeVar):
        return True
    if origin is typing.Union or origin is type(int | str):
        return any(_fits(value, a) for a in arguments)
    if origin is typing.Literal:
        return value in arguments
    if hint is type(None):
        return value is None
    if hint is bool:
        return isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is str:
        return isinstance(value, str)
    kind = origin or hint
    if kind in (list, tuple, abc.Sequence):
        return isinstance(value, (list, tuple)) and _parts_fit(value, arguments, fixed=kind is tuple)
    if kind in (dict, abc.Mapping):
        return isinstance(value, dict) and _parts_fit(value.values(), arguments[1:], fixed=False)
    return True


def _parts_fit(values, hints: tuple, fixed: bool) -> bool:
    """Do the members of a list, or the values of a table, fit? `fixed`: of tuple[int, int], as many as named."""
    if fixed and hints and Ellipsis not in hints:
        return len(values) == len(hints) and all(_fits(v, h) for v, h in zip(values, hints))
    return not hints or all(_fits(v, hints[0]) for v in values)


def _name(hint) -> str:
    return str(hint).replace("typing.", "") if typing.get_args(hint) else getattr(hint, "__name__", str(hint))


def plural(group: str) -> str:
    """The word of `ssmzoo list` for a group of configs."""
    return group if group == "data" else f"{group}s"


LISTED = ("model", "task", "data", "experiment", "optim", "trainer", "logger")  # that `ssmzoo list` knows


def explain_hydra_error(error: Exception) -> str:
    """One line for the errors Hydra raises while composing, with the nearest valid names."""
    text = str(error)
    missing = re.search(r"Could not find '([^']+)'", text) or re.search(r"In '[^']+': Could not find '([^']+)'", text)
    if missing:
        group, _, name = missing.group(1).rpartition("/")
        names = config_names(group) if group else []
        choices = (
            f"; choose one of {', '.join(names)}"
            if len(names) <= 12
            else f"; `ssmzoo list {plural(group)}` prints all {len(names)}"
            if group in LISTED
            else f"; there are {', '.join(names)}"
        )
        return f"unknown {group or 'config'} {name!r}{nearest(name, names)}{choices}"
    key = re.search(r"Could not override '([^']+)'", text)
    if key:
        known = list(OmegaConf.load(config_dir() / "train.yaml")) + list(FREE_ROOTS)
        near = nearest(key.group(1), known)
        return f"unknown key {key.group(1)!r} on the command line{near}; top-level keys: {', '.join(sorted(known))}"
    if type(error).__name__ == "OverrideParseException":
        given = error.override.removeprefix("++")
        return f"{given!r} cannot be read; expected key=value, with quotes around more than plain words"
    return " ".join(text.split("\n")[0].split())
