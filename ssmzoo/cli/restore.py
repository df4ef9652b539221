"""`ssmzoo restore PICTURE ...`: super-resolution, denoising or JPEG repair of picture files, whole folders included."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

TASKS = ("sr", "denoise", "jpeg")
OTHER_PICTURES = (".gif", ".pbm", ".heic", ".avif", ".jp2", ".svg")  # as --out surely no folder
READ_ONLY = (".gif", ".pbm")  # results are PNG: 256 colours, or black and white, would not hold them
TASK_OF = {"bicubic": "sr", "noise": "denoise", "jpeg": "jpeg", "paired": "denoise"}  # data.degradation -> --task


def add_parser(subparsers) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "restore",
        help="restore pictures of any size with a trained model",
        description=(
            "Restore PNG, JPEG, TIFF, WebP, BMP and PNM pictures (8 or 16 bits, grey, RGB, transparency, orientation, "
            "resolution, camera's notes and colour profile kept; of GIF the first frame, into PNG) or whole folders. A "
            "result that exists is kept, so an interrupted run is continued by the same command."
        ),
    )
    parser.add_argument("inputs", nargs="+", type=Path, help="picture files or folders")
    parser.add_argument("--ckpt", help="run folder or checkpoint; with --model, a released .pth file")
    parser.add_argument("--model", help="preset of a released --ckpt, or without one the name of released weights")
    parser.add_argument("--task", choices=TASKS, help="what the checkpoint is expected to do")
    parser.add_argument("--scale", type=int, help="the enlargement expected of the checkpoint")
    parser.add_argument("-o", "--out", type=Path, help="folder, or file for one picture; default: beside the input")
    parser.add_argument("--overwrite", action="store_true", help="replace results that exist")
    parser.add_argument("--tile", type=int, default=192, help="side of a tile in input pixels (192)")
    parser.add_argument("--overlap", type=int, default=32, help="pixels that tiles share and cross-fade (32)")
    parser.add_argument("--self-ensemble", action="store_true", help="average over 8 flips and transposes (8x slower)")
    parser.add_argument("--device", default=None, help="cpu, cuda, ...; the GPU if there is one")
    return parser


def run(args) -> int:
    from ssmzoo.data.image_file import ImageError
    from ssmzoo.train.freed_memory import keep_freed_memory

    keep_freed_memory()
    jobs = plan(args.inputs, args.out)
    model = load(args)
    label = f"_x{model.upscale}" if model.upscale > 1 else "_restored"
    jobs = [(source, target or result_name(source.with_stem(source.stem + label))) for source, target in jobs]
    done, kept, failed = 0, 0, 0
    for source, target in jobs:
        if target.exists() and not args.overwrite:
            kept += 1
            print(f"{target} exists and is kept (--overwrite replaces it)")
            continue
        try:
            restore_one(model, source, target, args)
            done += 1
        except ImageError as error:
            failed += 1
            print(f"error: {error}", file=sys.stderr)
            if "could not be written" in str(error):  # a full disk will not get better with the next picture
                break
        except ValueError as error:
            failed += 1
            print(f"error: {source}: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            print(
                f"\nstopped; {done} restored, {len(jobs) - done - kept - failed} left: the same command continues",
                file=sys.stderr,
            )
            raise
    print(f"{done} restored, {kept} kept, {failed} failed")
    return 1 if failed else 0


def plan(inputs: list[Path], out: Path | None) -> list[tuple[Path, Path | None]]:
    """[(input file, output file or None for "beside the input")]; ValueError for what cannot be meant."""
    from ssmzoo.data.image_file import WRITABLE, find_pictures, walk_files

    jobs: list[tuple[Path, Path | None]] = []
    suffix = "" if out is None else out.suffix.lower()
    if suffix in OTHER_PICTURES or (out is not None and out.is_file() and suffix not in WRITABLE):
        raise ValueError(f"--out {out} is neither a folder nor a file for a picture ({', '.join(WRITABLE)})")
    for given in inputs:
        if given.is_dir():
            if out is None:
                raise ValueError(f"{given} is a folder: say with --out where its results go")
            results = out.resolve()
            own = results != given.resolve()  # results of an earlier run below the folder are not inputs
            everything, found = (
                [f for f in files if not (own and results in f.resolve().parents)]
                for files in (walk_files(given), find_pictures(given))
            )
            others = [f.relative_to(given) for f in everything if f not in set(found)]
            if others:
                names = f"{', '.join(map(str, others[:10]))}{' ...' if len(others) > 10 else ''}"
                print(f"{len(others)} file(s) in {given} are passed over, no pictures by their suffix: {names}")
            jobs += [(f, result_name(out / f.relative_to(given))) for f in found]
        elif not given.exists():
            raise ValueError(f"no picture or folder at {given}")
        elif out is None:
            jobs.append((given, None))
        else:
            is_file = suffix in WRITABLE and not out.is_dir()
            if is_file and len(inputs) > 1:
                raise ValueError(f"--out {out} is one file and there are {len(inputs)} inputs; give a folder")
            jobs.append((given, out if is_file else result_name(out / given.name)))
    for source, target in jobs:
        if target is not None and target.resolve() == source.resolve():
            raise ValueError(f"{target} is the input itself; choose another --out")
    targets = [t for _, t in jobs if t is not None]
    if len(set(targets)) < len(targets):
        raise ValueError("two inputs would be written to the same file; restore them into separate folders")
    return jobs


def result_name(path: Path) -> Path:
    """`path` with a suffix that its picture's restoration can be written under."""
    return path.with_name(path.name + ".png") if path.suffix.lower() in READ_ONLY else path


def load(args):
    """The model, checked against --task and --scale."""
    import torch

    from ssmzoo.zoo import load_model

    if not args.model and not args.ckpt:
        raise ValueError("give --ckpt RUN, or --model with a name that `ssmzoo weights list 'mambair*'` prints")
    if args.model:
        model, degradation = load_released(args.model, args.ckpt), None
    else:
        model, manifest = load_model(args.ckpt)
        degradation = manifest.get("config", {}).get("data", {}).get("degradation", "bicubic")
        if not hasattr(model, "size_multiple"):
            raise ValueError(f"{args.ckpt} holds {manifest.get('model')}, which does not restore pictures")
    if args.scale is not None and args.scale != model.upscale:
        raise ValueError(f"--scale is {args.scale}, but the checkpoint was built for x{model.upscale}")
    task = TASK_OF[degradation] if degradation else ("sr" if model.upscale > 1 else args.task)
    if args.task and args.task != task:
        raise ValueError(f"--task is {args.task}, but the checkpoint was trained for {task}")
    if args.tile < 1:
        raise ValueError(f"--tile is {args.tile}; it must be at least 1 pixel")
    if not 0 <= args.overlap <= args.tile // 3:
        raise ValueError(f"--overlap is {args.overlap}; with --tile {args.tile} it can be 0 to {args.tile // 3}")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)  # MambaIRv2 with routing=gumbel draws noise
    try:
        return model.eval().to(device)
    except (RuntimeError, AssertionError) as error:  # torch's ways to say that there is no such device
        raise ValueError(f"--device is {device}: {str(error).splitlines()[0]}") from None


def load_released(name: str, file: str | None):
    """A preset with the weights of a released file, or with those that `ssmzoo weights` fetches."""
    from ssmzoo.presets import build_preset
    from ssmzoo.released.catalogue import split_name
    from ssmzoo.zoo import create_model

    if not hasattr(build_preset(name if file else split_name(name)[0]), "size_multiple"):
        raise ValueError(f"--model {name} does not restore pictures; see `ssmzoo list models`")
    return create_model(name, checkpoint=file) if file else create_model(name, pretrained=True)


def restore_one(model, source: Path, target: Path, args) -> None:
    from ssmzoo.inference.restore import restore_file

    started = time.monotonic()
    written = restore_file(
        model,
        source,
        target,
        tile=args.tile,
        overlap=args.overlap,
        ensemble=args.self_ensemble,
        progress=Bar(source.name),
    )
    height, width = written.levels.shape[:2]
    notes = f" ({'; '.join(written.notes)})" if written.notes else ""
    print(
        f"{source} -> {target}: {width} x {height}, {8 * written.levels.itemsize} bits, "
        f"{time.monotonic() - started:.1f} s{notes}",
        flush=True,
    )


class Bar:
    """A progress line on a terminal; silent elsewhere and for pictures of one tile."""

    def __init__(self, name: str):
        self.name, self.started, self.shown = name, time.monotonic(), sys.stderr.isatty()

    def __call__(self, done: int, total: int) -> None:
        if not self.shown or total == 1:
            return
        left = (time.monotonic() - self.started) / done * (total - done)
        filled = round(30 * done / total)
        end = "\r\033[K" if done == total else ""
        bar = "#" * filled + "." * (30 - filled)
        sys.stderr.write(f"\r{self.name} [{bar}] {done}/{total} tiles, {left:.0f} s left{end}")
        sys.stderr.flush()
