"""What the kernels are compiled from, and its hash, which a compiled library carries (`ssmzoo_source_hash`)."""

from __future__ import annotations

import hashlib
from pathlib import Path

OPERATORS = Path(__file__).resolve().parent.parent


def source_hash(operators: Path = OPERATORS) -> str:
    """SHA-256 over names and contents of every *.c and *.h of the operators; empty where there are none."""
    files = sorted([*operators.glob("*/*.c"), *operators.glob("*/*.h")], key=lambda f: (f.parent.name, f.name))
    digest = hashlib.sha256()
    for file in files:
        content = file.read_bytes()
        digest.update(f"{file.parent.name}/{file.name} {len(content)}\n".encode() + content)
    return digest.hexdigest() if files else ""
