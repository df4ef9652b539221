"""`ssmzoo info MODEL`: parameters, constructor arguments and where the code is, without allocating the weights.

`ssmzoo info FILE` says what a file or folder of released weights is: family, sizes, wrapper, what to load it with.
`ssmzoo info MODEL --memory --batch 16 --gpus 8` predicts what a training step needs, also without running it.
"""

from __future__ import annotations

import argparse
import ast
import inspect
from pathlib import Path

from ssmzoo.presets import build_model, config_names, describe_config, model_class, read_model_config
from ssmzoo.suggest import nearest


def add_parser(subparsers) -> argparse.ArgumentParser:
    parser = subparsers.add_parser("info", help="size, arguments and source of a model")
    parser.add_argument("model", help="a name of `ssmzoo list models`, or a file or folder of weights")
    parser.add_argument(
        "overrides",
        nargs="*",
        help="constructor arguments, e.g. d_model=512; with --memory also any "
        "of train.py's, e.g. data.seq_len=2048 grad_checkpointing=true",
    )
    parser.add_argument("--memory", action="store_true", help="predict the memory of training")
    parser.add_argument("--batch", type=int, help="samples per step and process (default: the data's)")
    parser.add_argument("--gpus", type=int, help="processes that share the work (default 1)")
    return parser


def run(args) -> None:
    if args.memory:
        return memory(args)
    if args.batch is not None or args.gpus is not None:
        raise ValueError("--batch and --gpus belong to --memory, the prediction of a training step; give it too")
    if is_file(args.model):
        return weights(args)
    import torch

    from ssmzoo.layers.feedforward.moe import active_parameters
    from ssmzoo.train.ranges import out_of_range

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
    if wrong := out_of_range({"model": node}):
        raise ValueError(f"{wrong[0].removeprefix('model.')} is {wrong[1]}; expected {wrong[2]}")
    with torch.device("meta"):
        model = build_model(node)
    total = sum(p.numel() for p in model.parameters())
    print(f"{args.model}: {describe_config('model', args.model)}")
    print(
        f"class        {cls.__module__}.{cls.__name__}\n"
        f"home         task={config.get('task')} data={config.get('data')}"
    )
    print(f"parameters   {total:,}")
    if (active := active_parameters(model)) != total:
        print(f"active       {active:,} per token")
    for name, parameter in parameters.items():
        value = node.get(name, parameter.default)
        print(f"  {name:<22} {'(required)' if value is inspect.Parameter.empty else value}")


def is_file(name: str) -> bool:
    """A path of weights rather than a model's name: it exists, or is written like one."""
    from ssmzoo.released.files import SUFFIXES

    return "/" in name or Path(name).suffix in SUFFIXES or (Path(name).exists() and name not in config_names("model"))


def weights(args) -> None:
    if args.overrides:
        raise ValueError(f"{args.overrides[0]!r}: a file of weights takes no constructor arguments here")
    from ssmzoo.released.describe import describe

    print("\n".join(describe(args.model)))


def memory(args) -> None:
    """Bytes of parameters, gradients, optimiser, averaged weights and of a step, on one process, under DDP and FSDP."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from ssmzoo.train.config import explain_hydra_error
    from ssmzoo.train.memory import of_run

    args.gpus = 1 if args.gpus is None else args.gpus
    if args.gpus < 1 or (args.batch is not None and args.batch < 1):
        raise ValueError(f"--gpus is {args.gpus} and --batch {args.batch}; both must be at least 1")
    batch = [] if args.batch is None else [f"data.batch_size={args.batch}"]
    parameters = inspect.signature(model_class(read_model_config(args.model)["model"]["_target_"])).parameters
    overrides = [f"model.{o}" if o.partition("=")[0] in parameters else o for o in args.overrides]
    try:
        found, size, shapes = of_run([f"model={args.model}", *batch, *overrides])
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(explain_hydra_error(error)) from None
    print(f"{args.model}, {size} samples per process ({shapes}), {args.gpus} process(es)")
    rows = {
        "parameters and buffers": found.parameters,
        "gradients": found.gradients,
        "optimiser": found.optimizer,
        "averaged weights": found.ema,
        "activations and temporaries": found.step,
        "one process": found.on_one(),
        "resident on a CPU": found.resident(),
    }
    if args.gpus > 1:
        rows |= {
            f"each of {args.gpus} under trainer=ddp": found.ddp(),
            f"each of {args.gpus} under trainer=fsdp": found.fsdp(args.gpus),
        }
    for name, value in rows.items():
        print(f"  {name:<30}{value / 2**20:>12,.1f} MiB")
    print(f"traced with {found.traced} on a CPU; the program itself and, on a GPU, CUDA's context come on top")
    print("resident: with the holes that glibc's heap keeps between tensors")
