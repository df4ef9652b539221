"""`ssmzoo predict RUN_OR_NAME IMAGE ...`: classes of pictures; masks and boxes drawn on them by dense models."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path


def add_parser(subparsers) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "predict",
        help="classes of pictures, or masks and boxes drawn on them",
        description="Classify pictures with a trained run or with released weights (`ssmzoo weights list`); runs of "
        "task=segmentation and task=detection draw masks and boxes.",
    )
    parser.add_argument("model", help="run folder, checkpoint, or name of released weights such as vmamba_tiny")
    parser.add_argument("inputs", nargs="+", help="pictures, folders, or - for names of files on standard input")
    parser.add_argument("--top", type=int, default=5, help="classes per picture (5)")
    parser.add_argument("--batch", type=int, default=32, help="pictures at a time (32)")
    parser.add_argument("-o", "--out", type=Path, help="table as .csv or .json")
    parser.add_argument("--sheet", type=Path, help="contact sheet as .png")
    parser.add_argument("--draw", type=Path, help="folder for pictures with masks or boxes (predictions)")
    parser.add_argument("--min-score", type=float, default=0.3, help="objects below it are left out (0.3)")
    parser.add_argument("--size", type=int, help="short side at which classes of pixels are predicted (as in training)")
    parser.add_argument("--device", help="cpu, cuda, ... (cpu)")
    return parser


def run(args) -> int:
    from ssmzoo.inference.predict import draw_sheet, predict, write_table
    from ssmzoo.inference.predict_dense import is_dense

    check_out(args.out, (".csv", ".json"))
    check_out(args.sheet, (".png",))
    subject = subject_of(args)
    if is_dense(subject):
        return run_dense(subject, args)
    if args.draw or args.size is not None:
        raise ValueError(
            f"{args.model} classifies whole pictures: --draw and --size are for masks and boxes; use --sheet"
        )
    found, failed = [], []
    for p in predict(subject, pictures(args.inputs), args.top, args.batch, failed=failed.append):
        found.append(p)
        print(
            f"{p.file}: {', '.join(f'{name} {100 * share:.1f} %' for name, share in zip(p.classes, p.probabilities))}"
        )
    for error in failed:
        print(f"error: {error}", file=sys.stderr)
    if args.out and found:
        write_table(found, args.out)
    if args.sheet and found:
        draw_sheet(found, args.sheet)
    return 1 if failed else 0


def run_dense(subject, args) -> int:
    """Masks or boxes."""
    from ssmzoo.inference.predict_dense import predict_dense, write_objects

    if args.sheet:
        raise ValueError(f"{args.model} gives masks or boxes, which --draw writes; --sheet is for classes of pictures")
    found, failed = [], []
    folder = args.draw or Path("predictions")
    for p in predict_dense(subject, pictures(args.inputs), folder, args.size, args.min_score, failed.append):
        found.append(p)
        words = ", ".join(f"{name} {100 * value:.1f} %" for name, value, _ in p.found[: args.top])
        more = f" and {len(p.found) - args.top} more" if len(p.found) > args.top else ""
        print(f"{p.file}: {words or 'nothing found'}{more} -> {p.written[0]}")
    for error in failed:
        print(f"error: {error}", file=sys.stderr)
    if args.out and found:
        write_objects(found, args.out)
    return 1 if failed else 0


def subject_of(args):
    from ssmzoo.inference.subject import load_subject

    try:
        return load_subject(args.model, args.device)
    except (RuntimeError, AssertionError) as error:  # torch's ways to say that there is no such device
        raise ValueError(f"--device is {args.device}: {str(error).splitlines()[0]}") from None


def check_out(path: Path | None, suffixes: tuple[str, ...]) -> None:
    """Before anything is computed."""
    if path is None:
        return
    if path.suffix not in suffixes:
        raise ValueError(f"{path} must end in {' or '.join(suffixes)}")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{path}: there is no folder {path.parent}")


def pictures(inputs: list[str]) -> Iterator[Path]:
    """Picture files of names, folders and standard input. ValueError for what is not there."""
    from ssmzoo.data.image_file import find_pictures

    for given in inputs:
        if given == "-":
            yield from (Path(line.rstrip("\n")) for line in sys.stdin if line.strip())
        elif Path(given).is_dir():
            yield from find_pictures(given)
        elif not Path(given).exists():
            raise ValueError(f"no picture or folder at {given}")
        else:
            yield Path(given)
