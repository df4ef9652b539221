"""`ssmzoo verify DIR`: every golden case under DIR against our implementation, as a table."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from ssmzoo.suggest import nearest


def add_parser(subparsers) -> argparse.ArgumentParser:
    parser = subparsers.add_parser("verify", help="compare with golden cases of the official implementations")
    parser.add_argument("directory", help="folder of <family>/<case>.safetensors and .json")
    parser.add_argument("--family", help="only these families, separated by commas")
    parser.add_argument("--rtol", type=float, default=1e-4, help="largest relative error that passes (default 1e-4)")
    return parser


def run(args) -> int:
    """Exit status 1 unless every selected case is ok."""
    root = Path(args.directory)
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder")
    if not args.rtol > 0:
        raise ValueError(f"--rtol is {args.rtol}; it must be positive")
    files = sorted(f for f in root.glob("*/*.json") if is_case(f))
    families = sorted({f.parent.name for f in files})
    if args.family is not None:
        chosen = [name.strip() for name in args.family.split(",") if name.strip()]
        for name in chosen:
            if name not in families:
                raise ValueError(
                    f"no case of family {name!r} in {root}{nearest(name, families)}; there: {', '.join(families)}"
                )
        files = [f for f in files if f.parent.name in chosen]
    if not files:
        raise ValueError(f"{root} holds no golden case (<family>/<case>.safetensors and .json)")
    print(f"{'family':<22}{'case':<30}{'outputs':>10}{'gradients':>11}  result")
    start, counts = time.monotonic(), {"ok": 0, "FAIL": 0, "unsupported": 0}
    for file in files:
        outputs, gradients, result = check(file, args.rtol)
        counts[result.split(":")[0]] += 1
        print(f"{file.parent.name:<22}{file.stem:<30}{outputs:>10}{gradients:>11}  {result}", flush=True)
    print(
        f"{counts['ok']} ok, {counts['FAIL']} failed, {counts['unsupported']} unsupported "
        f"at {args.rtol:g} in {time.monotonic() - start:.0f} s"
    )
    return 0 if counts["ok"] == len(files) else 1


def is_case(file: Path) -> bool:
    """Whether a .json is a golden case: of a family that is known, or with its tensors beside it."""
    from ssmzoo.released.family import find

    known = any(find(file.parent.name, kind) for kind in ("official", "golden"))
    return known or file.with_suffix(".safetensors").is_file()


def check(file: Path, rtol: float) -> tuple[str, str, str]:
    """(error of outputs, of gradients, "ok" | "FAIL[: why]" | "unsupported") of one case, for printing."""
    from ssmzoo.released.golden import GoldenCase

    try:
        outputs, gradients = GoldenCase.load(file).check()
    except KeyError as error:
        if error.args == (file.parent.name,):
            return "-", "-", "unsupported"
        return "-", "-", f"FAIL: KeyError: {error}"
    except Exception as error:
        return "-", "-", f"FAIL: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    good = outputs <= rtol and (gradients is None or gradients <= rtol)
    return f"{outputs:.1e}", "-" if gradients is None else f"{gradients:.1e}", "ok" if good else "FAIL"
