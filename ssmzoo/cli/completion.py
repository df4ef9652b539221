"""`ssmzoo completion bash|zsh|fish`: what a shell needs to complete commands, models, tasks, data and run folders.

    eval "$(ssmzoo completion bash)"          in ~/.bashrc, zsh the same in ~/.zshrc
    ssmzoo completion fish | source           in ~/.config/fish/config.fish

Completions are made by the package argcomplete from the parser itself, without loading torch.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable
from pathlib import Path

SHELLS = ("bash", "zsh", "fish")
GROUPS = ("model", "task", "data", "experiment", "optim", "trainer", "logger", "debug", "hparams_search")
RUN_KEYS = ("resume", "config", "init_from", "ckpt")  # of train.py and eval.py, whose values are run folders
NAMES = {  # what a command's positional argument may be
    ("info", "model"): "models",
    ("generate", "checkpoint"): "runs",
    ("score", "model"): "runs",
    ("embed", "model"): "runs",
    ("predict", "model"): "runs",
    ("probe", "checkpoint"): "runs",
    ("restore", "ckpt"): "runs",
    ("runs", "what"): "runs",
    ("show", "checkpoint"): "runs",
    ("export", "checkpoint"): "runs",
    ("diff", "first"): "runs",
    ("diff", "second"): "runs",
    ("average", "checkpoints"): "runs",
    ("list", "what"): "lists",
    ("list", "task"): "tasks",
}


def add_parser(subparsers) -> argparse.ArgumentParser:
    parser = subparsers.add_parser("completion", help="completion of commands, models and runs in your shell")
    parser.add_argument("shell", choices=SHELLS, help='bash and zsh: eval "$(ssmzoo completion bash)"; fish: | source')
    return parser


def run(args) -> None:
    try:
        import argcomplete
    except ImportError:
        raise ValueError("completion needs the package argcomplete: pip install argcomplete") from None
    print(argcomplete.shellcode(["ssmzoo"], shell=args.shell))


def complete(parser: argparse.ArgumentParser) -> None:
    """Answer a shell that asks, and end; returns at once when none does."""
    if "_ARGCOMPLETE" not in os.environ:
        return
    import argcomplete

    argcomplete.autocomplete(parser, always_complete_options="long", default_completer=values)


def values(prefix: str, action: argparse.Action, parser: argparse.ArgumentParser, **_) -> list[str]:
    """What an argument may be that has no fixed choices."""
    command = parser.prog.split()[-1]
    if command in ("train", "eval"):
        return overrides(prefix)
    kind = NAMES.get((command, action.dest))
    return {"models": models, "runs": runs, "tasks": tasks, "lists": lists, None: files}[kind](prefix)


def models(prefix: str) -> list[str]:
    from ssmzoo.presets import config_names

    return starting(config_names("model"), prefix)


def tasks(prefix: str) -> list[str]:
    from ssmzoo.presets import config_names

    return starting(config_names("task"), prefix)


def lists(prefix: str) -> list[str]:
    from ssmzoo.cli.list_ import GROUPS

    return starting(GROUPS, prefix)


def runs(prefix: str) -> list[str]:
    """Run folders below runs/, then whatever a path may be; behind `runs` also the word compare."""
    folders = (f.parent.as_posix() for f in sorted(Path("runs").glob("*/*/config.yaml")))
    return starting(folders, prefix) or files(prefix)


def files(prefix: str) -> list[str]:
    folder, _, start = prefix.rpartition("/")
    found = sorted(Path(folder or ".").glob(f"{start}*")) if start.isprintable() else []
    return [f"{f.as_posix()}/" if f.is_dir() else f.as_posix() for f in found]


def overrides(prefix: str) -> list[str]:
    """`model=ma` -> `model=mamba`, ...; `resume=` -> run folders; before the sign the keys."""
    from ssmzoo.presets import config_names

    key, equals, value = prefix.partition("=")
    if not equals:
        return starting((f"{k}=" for k in (*GROUPS, *RUN_KEYS, "name", "seed")), prefix)
    if key in GROUPS:
        return [f"{key}={name}" for name in starting(config_names(key), value)]
    if key in RUN_KEYS:
        return [f"{key}={folder}" for folder in runs(value)]
    return []


def starting(names: Iterable[str], prefix: str) -> list[str]:
    return [name for name in names if name.startswith(prefix)]
