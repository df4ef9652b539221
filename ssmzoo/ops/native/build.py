"""Compile the CPU kernels: every *.c of the operators and of this folder, one library per instruction set.

    python -m ssmzoo.ops.native.build

The libraries have a plain C interface and know nothing of torch or Python, so that no upgrade of either breaks them.
"""

from __future__ import annotations

import hashlib
import os
import platform
import runpy
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
OPERATORS = HERE.parent
SOURCES = runpy.run_path(str(HERE / "sources.py"))  # by path: an installation runs this file before the package exists
FLAGS = [
    "-std=gnu11",
    "-O3",
    "-fPIC",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-Wall",
    "-pthread",
]
X86_LEVELS = {
    "avx512": [
        "-mavx512f",
        "-mavx512dq",
        "-mavx512bw",
        "-mavx512vl",
        "-mavx2",
        "-mfma",
        "-mf16c",
        "-mprefer-vector-width=512",
    ],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "plain": [],
}


class BuildError(RuntimeError):
    """The compiler is missing or refused; the message says what it said."""


def levels() -> dict[str, list[str]]:
    """Compiler flags by instruction set, best first, for this machine's architecture."""
    machine = platform.machine().lower()
    if machine in ("x86_64", "amd64"):
        return X86_LEVELS
    return {"neon": []} if machine in ("aarch64", "arm64") else {"plain": []}


def compiler() -> str:
    for name in (os.environ.get("CC"), "cc", "gcc", "clang"):
        if name and shutil.which(name.split()[0]):
            return name
    raise BuildError("no C compiler found (looked for $CC, cc, gcc, clang)")


def build(target: Path = HERE) -> list[Path]:
    """Compile and link; objects are kept and reused. A library is replaced in one step. Raises BuildError."""
    if sys.platform == "win32":  # threads and aligned memory are POSIX's, and so are the calls of parallel.c
        raise BuildError("the kernels are not built on Windows, where PyTorch's functions serve; WSL has them")
    cc = compiler().split()
    cache = HERE / "__pycache__"
    cache.mkdir(exist_ok=True)
    target.mkdir(parents=True, exist_ok=True)
    headers = b"".join(h.read_bytes() for h in sorted(OPERATORS.glob("*/*.h")))
    carried = {"hash.c": [f'-DSSMZOO_SOURCE_HASH="{SOURCES["source_hash"]()}"']}
    objects: dict[str, list[Path]] = {level: [] for level in levels()}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = []
        for source in sorted(OPERATORS.glob("*/*.c")):
            for level, flags in levels().items():
                command = [*cc, *FLAGS, *flags, *carried.get(source.name, ()), f"-I{HERE}", "-c", str(source)]
                content = source.read_bytes() + headers + " ".join(command).encode()
                obj = cache / f"{source.stem}.{level}.{hashlib.sha256(content).hexdigest()[:16]}.o"
                objects[level].append(obj)
                if not obj.exists():
                    jobs.append(pool.submit(_compile, command, obj, cache.glob(f"{source.stem}.{level}.*.o")))
        for job in jobs:
            job.result()
    return [_link(cc, objs, target / f"_kernels.{level}.so") for level, objs in objects.items()]


def _compile(command: list[str], obj: Path, stale) -> None:
    for old in list(stale):
        old.unlink(missing_ok=True)
    _write([*command, "-o"], obj)


def _link(cc: list[str], objects: list[Path], library: Path) -> Path:
    _write([*cc, "-shared", "-pthread", *map(str, objects), "-lm", "-o"], library)
    return library


def _write(command: list[str], output: Path) -> None:
    part = output.with_suffix(f".{os.getpid()}.tmp")
    result = subprocess.run([*command, str(part)], capture_output=True, text=True)
    if result.returncode:
        part.unlink(missing_ok=True)
        raise BuildError(f"{' '.join(command)} failed:\n{result.stderr.strip()}")
    if result.stderr.strip():
        print(result.stderr.strip(), file=sys.stderr)
    part.replace(output)


if __name__ == "__main__":
    try:
        for path in build():
            print(path)
    except BuildError as error:
        raise SystemExit(str(error)) from None
