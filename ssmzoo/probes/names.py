"""Which probes there are: read off the files of this folder, without importing one."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path


@cache
def probes() -> dict[str, str]:
    """{name: first sentence} of every file here with a top-level `probe(subject)` (or `run(model, data, out_dir)`)."""
    found = {}
    for file in sorted(Path(__file__).parent.glob("*.py")):
        source = file.read_text(encoding="utf-8")
        if re.search(r"^def (probe\(subject|run\(model)", source, re.MULTILINE):
            found[file.stem] = re.match(r'"""(.*?)[\n"]', source).group(1)
    return found
