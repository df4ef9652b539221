"""`ssmzoo list models|tasks|data|experiments`: what there is, a line each."""

from __future__ import annotations

import argparse
import fnmatch

from ssmzoo.presets import config_names, describe_config, list_models
from ssmzoo.suggest import nearest

GROUPS = {
    "models": "model",
    "tasks": "task",
    "data": "data",
    "experiments": "experiment",
    "optims": "optim",
    "trainers": "trainer",
    "loggers": "logger",
}


def add_parser(subparsers) -> argparse.ArgumentParser:
    parser = subparsers.add_parser("list", help="models, tasks, data sets, experiments, each in a line")
    parser.add_argument("what", help=", ".join(GROUPS))
    parser.add_argument("pattern", nargs="?", default="*", help="glob of names, e.g. 'mamba*'")
    parser.add_argument("--task", help="only models of this task")
    return parser


def run(args) -> None:
    if args.what not in GROUPS:
        raise ValueError(f"nothing is listed as {args.what!r}{nearest(args.what, GROUPS)}; choose {', '.join(GROUPS)}")
    group = GROUPS[args.what]
    if args.task is not None:
        if group != "model":
            raise ValueError(f"--task chooses models; `ssmzoo list {args.what}` takes no task")
        if args.task not in (tasks := config_names("task")):
            raise ValueError(f"unknown task {args.task!r}{nearest(args.task, tasks)}; known: {', '.join(tasks)}")
    names = list_models("*", args.task) if group == "model" else config_names(group)
    found = fnmatch.filter(names, args.pattern)
    if not found:
        raise ValueError(f"no name of {args.what} fits {args.pattern!r}{nearest(args.pattern, names)}")
    width = max(map(len, found))
    for name in found:
        print(f"{name:<{width}}  {describe_config(group, name)}")
