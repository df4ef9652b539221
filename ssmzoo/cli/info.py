"""`ssmzoo info MODEL`: parameters, constructor arguments and where the code is, without allocating the weights."""

from __future__ import annotations

import argparse
import ast
import inspect

from ssmzoo.official import nearest
from ssmzoo.zoo import build_model, describe_config, model_class, read_model_config


def add_parser(subparsers) -> argparse.ArgumentParser:
    parser = subparsers.add_parser("info", help="size, arguments and source of a model")
    parser.add_argument("model", help="a name of `ssmzoo list models`")
    parser.add_argument("overrides", nargs="*", help="constructor arguments, e.g. d_model=512")
    return parser


def run(args) -> None:
    import torch

    config = read_model_config(args.model)
    node = {k: v for k, v in config["model"].items() if not (isinstance(v, str) and v.startswith("${"))}
    cls = model_class(node["_target_"])
    parameters = inspect.signature(cls).parameters
    for override in args.overrides:
        key, equals, value = override.partition("=")
        if not equals or key not in parameters:
            raise ValueError(f"{override!r} sets no argument of {cls.__name__}{nearest(key, parameters)}")
        try:
            node[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            node[key] = {"true": True, "false": False, "null": None}.get(value, value)
    with torch.device("meta"):
        model = build_model(node)
    total = sum(p.numel() for p in model.parameters())
    print(f"{args.model}: {describe_config('model', args.model)}")
    print(
        f"class        {cls.__module__}.{cls.__name__}\n"
        f"home         task={config.get('task')} data={config.get('data')}"
    )
    print(f"parameters   {total:,}")
    if hasattr(model, "num_parameters"):
        print(f"active       {model.num_parameters()[1]:,} per token")
    for name, parameter in parameters.items():
        value = node.get(name, parameter.default)
        print(f"  {name:<22} {'(required)' if value is inspect.Parameter.empty else value}")
