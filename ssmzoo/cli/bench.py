"""`ssmzoo bench [NAME]`: our operators and models beside what people use today, timed on this machine."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path


def add_parser(subparsers) -> argparse.ArgumentParser:
    parser = subparsers.add_parser("bench", help="time operators and models beside what people use today")
    parser.add_argument(
        "name",
        nargs="?",
        default="",
        help="cases whose name has this in it: scan, conv, ssd, dense_scan, fusion, training step, "
        "decoding; default: all",
    )
    parser.add_argument("--repeats", type=int, default=15, help="interleaved runs per contender (default 15)")
    parser.add_argument("--out", type=Path, default=Path("bench"), help="folder for the table and the picture")
    parser.add_argument("--list", action="store_true", help="only list the cases")
    return parser


def run(args) -> None:
    module = _load()
    if args.repeats < 1:
        raise ValueError(f"--repeats is {args.repeats}; it must be at least 1")
    cases = module.load_cases(args.name)
    if not cases:
        raise ValueError(f"no case has {args.name!r} in its name; `ssmzoo bench --list` shows them")
    if args.list:
        print("\n".join(case.name for case in cases))
        return
    blocker = next((p for p in (args.out, *args.out.parents) if p.exists()), None)
    if blocker is not None and not blocker.is_dir():
        raise ValueError(f"--out {args.out} needs a folder, but {blocker} is a file")
    module.run(cases, args.repeats, args.out, args.name)


def _load():
    """benchmarks/ops.py: inside the package when installed from a wheel, beside it in a checkout."""
    import sys

    here = Path(__file__).parent.parent
    folder = here / "benchmarks" if (here / "benchmarks").is_dir() else here.parent / "benchmarks"
    spec = importlib.util.spec_from_file_location("ops", folder / "ops.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["ops"] = module  # the files of cases import it by this name
    spec.loader.exec_module(module)
    return module
