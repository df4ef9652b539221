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
        "decoding; default: all but the language presets at equal parameters",
    )
    parser.add_argument("--quick", action="store_true", help="a few telling cases only, in under a minute")
    parser.add_argument("--repeats", type=int, default=15, help="interleaved runs per contender, at most (default 15)")
    parser.add_argument("--seconds", type=float, help="measuring per case (default 1.5; 1 with --quick)")
    parser.add_argument("--sets", default="", help="a column for each of these: avx512,avx2,neon,plain")
    parser.add_argument("--out", type=Path, default=Path("bench"), help="folder for the table and the picture")
    parser.add_argument("--list", action="store_true", help="only list the cases")
    return parser


def run(args) -> None:
    blocker = next((p for p in (args.out, *args.out.parents) if p.exists()), None)
    if blocker is not None and not blocker.is_dir():
        raise ValueError(f"--out {args.out} needs a folder, but {blocker} is a file")
    if args.repeats < 1:
        raise ValueError(f"--repeats is {args.repeats}; it must be at least 1")
    seconds = (1.0 if args.quick else 1.5) if args.seconds is None else args.seconds
    if not seconds > 0:
        raise ValueError(f"--seconds is {seconds:g}; it must be above 0")
    module = _load()
    levels = args.sets.split(",")
    if unknown := [level for level in levels if level and level not in module.SETS]:
        raise ValueError(f"--sets {unknown[0]} is no instruction set; there are {', '.join(module.SETS)}")
    cases = [case for case in module.load_cases(args.name) if case.quick or not args.quick]
    if not cases:
        few = " among the quick ones" if args.quick else ""
        raise ValueError(f"no case{few} has {args.name!r} in its name; `ssmzoo bench --list` shows them")
    if args.list:
        print("\n".join(case.name for case in cases))
        return
    module.run(cases, args.repeats, args.out, args.name, seconds, levels)


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
