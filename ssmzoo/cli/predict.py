"""`ssmzoo predict RUN_OR_NAME IMAGE ...`: classes of pictures, with names and probabilities."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path


def add_parser(subparsers) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "predict",
        help="classes of pictures, with names and probabilities",
        description="Classify pictures with a trained run or with released weights (`ssmzoo weights list`).",
    )
    parser.add_argument("model", help="run folder, checkpoint, or name of released weights such as vmamba_tiny")
    parser.add_argument("inputs", nargs="+", help="pictures, folders, or - for names of files on standard input")
    parser.add_argument("--top", type=int, default=5, help="classes per picture (5)")
    parser.add_argument("--batch", type=int, default=32, help="pictures at a time (32)")
    parser.add_argument("-o", "--out", type=Path, help="table as .csv or .json")
    parser.add_argument("--sheet", type=Path, help="contact sheet as .png")
    parser.add_argument("--device", help="cpu, cuda, ... (cpu)")
    return parser


def run(args) -> int:
    from ssmzoo.inference.predict import draw_sheet, predict, write_table

    check_out(args.out, (".csv", ".json"))
    check_out(args.sheet, (".png",))
    found, failed = [], []
    for p in predict(subject_of(args), pictures(args.inputs), args.top, args.batch, failed=failed.append):
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
