"""`ssmzoo list models|tasks|data|experiments`: what there is, a line each."""

from __future__ import annotations

import argparse

from ssmzoo.zoo import config_names, describe_config, list_models

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
    parser.add_argument("what", choices=sorted(GROUPS))
    parser.add_argument("pattern", nargs="?", default="*", help="glob, for models")
    parser.add_argument("--task", help="only models of this task")
    return parser


def run(args) -> None:
    group = GROUPS[args.what]
    names = list_models(args.pattern, args.task) if group == "model" else config_names(group)
    width = max(map(len, names), default=0)
    for name in names:
        print(f"{name:<{width}}  {describe_config(group, name)}")
