"""The table of docs/export.md, which model has which layout: python benchmarks/exports.py (--check writes them too)

Models are the tiny ones of the tests, so that everything is asked of the code itself; a dot is a refusal in words.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "inference")]

import exports  # noqa: E402

from ssmzoo.inference.export import export, formats  # noqa: E402
from ssmzoo.inference.export.source import Source  # noqa: E402
from ssmzoo.inference.export.to_hf import why_not_native  # noqa: E402

SLOW = ("onnx",)  # to write; asked only


def main() -> None:
    check, columns = "--check" in sys.argv, formats()
    print("| class | " + " | ".join(columns) + " |\n|---|" + "---|" * len(columns))
    rows: dict[str, list[str]] = {}
    for name, node in exports.RUNS.items():
        title = node["_target_"].rpartition(".")[2]
        if title in rows:
            continue
        source = Source(exports.build_model(node).eval(), {"model": name, "config": {"model": node}}, name)
        rows[title] = [cell(source, to, format, check) for to, format in columns.items()]
    for title in sorted(rows):
        print(f"| {title} | " + " | ".join(rows[title]) + " |")


def cell(source: Source, to: str, format, check: bool) -> str:
    if format.refuse(source):
        return "·"
    if check and to not in SLOW:
        with tempfile.TemporaryDirectory() as folder:
            export(source, to, Path(folder) / "out")
    own = to == "hf" and why_not_native(source) is not None
    return "zoo's class" if own else "yes"


if __name__ == "__main__":
    main()
