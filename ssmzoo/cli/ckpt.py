"""`ssmzoo ckpt show|diff|average|export`: look into checkpoints, compare, average and convert them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def add_parser(subparsers) -> argparse.ArgumentParser:
    parser = subparsers.add_parser("ckpt", help="look into checkpoints, compare, average, export them")
    actions = parser.add_subparsers(dest="action", required=True, metavar="show|diff|average|export")
    show = actions.add_parser("show", help="what a checkpoint is and holds")
    show.add_argument("checkpoint")
    show.add_argument("--tensors", action="store_true", help="list every tensor")
    diff = actions.add_parser("diff", help="configuration and weights that differ between two checkpoints")
    diff.add_argument("first")
    diff.add_argument("second")
    average = actions.add_parser("average", help="mean of the weights of several checkpoints of one model")
    average.add_argument("checkpoints", nargs="+")
    average.add_argument("--out", required=True, help="new checkpoint folder")
    export = actions.add_parser("export", help="weights for other programs, in their names and files")
    export.add_argument("checkpoint", help="a run folder, a checkpoint, or a released file or folder")
    export.add_argument("--to", metavar="FORMAT", help="the program's layout; --to list names them")
    export.add_argument("--type", metavar="TYPE", help="of gguf's large matrices: f32 (default), f16, q8_0 or q4_0")
    export.add_argument("--out", help="new folder; without --to: a file ending in .safetensors or .pt")
    return parser


def run(args) -> None:
    {"show": show, "diff": diff, "average": average, "export": export}[args.action](args)


def show(args) -> None:
    from ssmzoo.checkpoint_files import find_checkpoint, read_manifest, read_weights

    folder = find_checkpoint(args.checkpoint)
    manifest = read_manifest(folder)
    weights = read_weights(folder)
    print(f"{folder}\nmodel       {manifest['model']}  step {manifest.get('step')}  epoch {manifest.get('epoch')}")
    print(f"parameters  {sum(w.numel() for w in weights.values()):,} in {len(weights)} tensors")
    print(f"versions    {', '.join(f'{k} {v}' for k, v in manifest.get('versions', {}).items())}")
    print(f"git commit  {manifest.get('git_commit')}")
    print(f"data        {json.dumps(manifest.get('data', {}))}")
    print(f"metrics     {', '.join(f'{k} {v:.4g}' for k, v in manifest.get('metrics', {}).items())}")
    for name, digest in manifest["files"].items():
        print(f"file        {name} {(folder / name).stat().st_size:,} bytes, SHA-256 {digest[:16]}... ok")
    for name, tensor in weights.items() if args.tensors else ():
        print(f"  {name:<60} {str(tensor.dtype).removeprefix('torch.'):<9} {tuple(tensor.shape)}")


def flatten(config: dict, prefix: str = "") -> dict[str, object]:
    """{"model.d_model": 256, ...} of a nested configuration."""
    flat: dict[str, object] = {}
    for key, value in config.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def diff(args) -> None:
    from ssmzoo.checkpoint_files import find_checkpoint, read_manifest, read_weights
    from ssmzoo.released.golden import relative_error

    folders = [find_checkpoint(p) for p in (args.first, args.second)]
    a, b = (flatten(read_manifest(f)["config"]) for f in folders)
    for key in sorted(a.keys() | b.keys()):
        if a.get(key) != b.get(key):
            print(f"{key}: {a.get(key)!r} -> {b.get(key)!r}")
    first, second = (read_weights(f) for f in folders)
    for name in sorted(first.keys() | second.keys()):
        if name not in first or name not in second:
            print(f"{name}: only in {'the second' if name not in first else 'the first'}")
        elif first[name].shape != second[name].shape:
            print(f"{name}: {tuple(first[name].shape)} -> {tuple(second[name].shape)}")
        elif (change := relative_error(second[name], first[name])) > 0:
            print(f"{name}: changed by {change:.2e} of its norm")


def average(args) -> None:
    """Floating tensors are averaged in float64; others must be equal."""
    import torch

    from ssmzoo.checkpoint_files import find_checkpoint, read_manifest, read_weights
    from ssmzoo.train.checkpoint import write_checkpoint

    out = Path(args.out)
    if out.exists():
        raise FileExistsError(f"{out} exists; choose another --out")
    folders = [find_checkpoint(p) for p in args.checkpoints]
    manifests = [read_manifest(f) for f in folders]
    if len({json.dumps(m["config"]["model"], sort_keys=True) for m in manifests}) > 1:
        raise ValueError(
            "the checkpoints are of different models (`ssmzoo ckpt diff` shows where); weights can't be averaged"
        )
    every = [read_weights(f) for f in folders]
    weights = {}
    for name, first in every[0].items():
        tensors = [w[name] for w in every]
        if first.is_floating_point():
            weights[name] = torch.stack([t.double() for t in tensors]).mean(0).to(first.dtype)
        elif all(torch.equal(first, t) for t in tensors):
            weights[name] = first
        else:
            raise ValueError(f"{name} is not a floating-point tensor and differs between the checkpoints")
    kept = {k: v for k, v in manifests[0].items() if k not in ("files", "tied", "format", "metrics")}
    write_checkpoint(out, weights, kept | {"averaged": [str(f) for f in folders]})
    print(f"average of {len(folders)} checkpoints in {out}")


def export(args) -> None:
    if args.to == "list":
        return list_formats(args.checkpoint)
    if args.out is None:
        raise ValueError("--out is missing: the folder to make, or without --to a file ending in .safetensors or .pt")
    if args.to is None and args.type is not None:
        raise ValueError("--type belongs to --to gguf")
    if args.to is None:
        return export_file(args)
    from ssmzoo.inference.export import export as write

    out = write(args.checkpoint, args.to, args.out, **({} if args.type is None else {"type": args.type}))
    for file in sorted(out.iterdir()):
        print(f"{file}  {file.stat().st_size:,} bytes")


def list_formats(checkpoint: str) -> None:
    """Every format, and for those that this model does not have the reason."""
    from ssmzoo.inference.export import formats, refusal
    from ssmzoo.inference.export.source import read_source

    source = read_source(checkpoint)
    for name, format in formats().items():
        reason = refusal(name, source)
        print(f"{name:<13} {format.__doc__.splitlines()[0] if reason is None else f'no: {reason}'}")


def export_file(args) -> None:
    import torch
    from safetensors.torch import save_file

    from ssmzoo.checkpoint_files import read_weights

    out = Path(args.out)
    if out.exists():
        raise FileExistsError(f"{out} exists; choose another --out")
    if out.suffix not in (".safetensors", ".pt", ".pth"):
        raise ValueError(f"--out is {out}: it must end in .safetensors or .pt")
    if not out.absolute().parent.is_dir():
        raise ValueError(f"--out is {out}: there is no folder {out.parent}")
    weights = {k: v.clone().contiguous() for k, v in read_weights(args.checkpoint).items()}
    temporary = out.with_name(f".{out.name}.tmp")
    try:
        if out.suffix == ".safetensors":
            save_file(weights, temporary, metadata={"format": "pt"})
        else:
            torch.save(weights, temporary)
        temporary.replace(out)
    finally:  # a full disk or an interrupt leaves nothing behind
        temporary.unlink(missing_ok=True)
    print(f"{len(weights)} tensors in {out}")
