"""The operators' tests on kernels for 64-bit ARM (NEON), compiled with a cross compiler and run by QEMU on x86.

    python tools/emulate/run.py [pytest arguments]

By default a small call of every operator (test_kernels.py) and tests at awkward sizes, and it fails where a kernel was
not called: 80 s, 2:17 with start and end (kernels compiled already), on two cores with eight other programs.
Only the kernels are emulated: tensors lie in memory that this process and the emulated one share (arena.c, serve.c).
Needs Linux and two packages: apt-get install qemu-user gcc-aarch64-linux-gnu (or clang, with CC=clang and the libraries
of the latter). Exit status 77 when they are missing.
"""

from __future__ import annotations

import hashlib
import json
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
NATIVE = ROOT / "ssmzoo/ops/native"
BUILD = runpy.run_path(str(NATIVE / "build.py"))
EMULATOR, SYSROOT, MISSING = "qemu-aarch64", "/usr/aarch64-linux-gnu", 77
ARENA = 4 << 30  # bytes, of arena.h; a sparse file
TESTS = ("exponential", "selective_scan", "ssd", "dense_scan", "rms_norm", "gated_linear_recurrence", "complex_scan",
         "matrix", "cross_selective_scan", "depthwise_conv2d", "image_ops", "state_fusion",
         "trapezoidal_scan")  # fmt: skip
CHOSEN = (
    "relative_error or every_kind or edges or extreme_sizes or poisoned or sorted_at_once or few_tokens or 70-1 or "
    "(values_and_gradients and not torch- and not torch])"
)


def cross_compiler() -> list[str] | None:
    wanted = os.environ.get("CC", "")
    if "clang" in wanted:
        return [wanted, "--target=aarch64-linux-gnu"] if shutil.which(wanted) else None
    return ["aarch64-linux-gnu-gcc"] if shutil.which("aarch64-linux-gnu-gcc") else None


def compiled(cc: list[str], target: Path) -> tuple[Path, Path]:
    """(shared library of the kernels, program that serves calls), objects kept by content."""
    target.mkdir(parents=True, exist_ok=True)
    content = "".join(f"{f}{f.read_text()}" for f in sorted([*HERE.glob("*.[ch]")]))
    key = hashlib.sha256((" ".join(cc) + BUILD["SOURCES"]["source_hash"]() + content).encode()).hexdigest()[:12]
    library, program = target / f"kernels.{key}.so", target / f"serve.{key}"
    if not (library.exists() and program.exists()):
        flags = [*BUILD["FLAGS"], f"-I{NATIVE}", '-DSSMZOO_SOURCE_HASH="emulated"']
        sources = sorted(NATIVE.parent.glob("*/*.c"))
        with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = [str(Path(folder) / f"{i}.o") for i in range(len(sources))]
            commands = [[*cc, *flags, "-c", str(s), "-o", o] for s, o in zip(sources, objects)]
            for done in pool.map(lambda c: subprocess.run(c, capture_output=True, text=True), commands):
                if done.returncode:
                    sys.exit(done.stderr)
            subprocess.run([*cc, "-shared", "-pthread", *objects, "-lm", "-o", str(library)], check=True)
        subprocess.run([*cc, "-O2", str(HERE / "serve.c"), "-ldl", "-o", str(program)], check=True)
    return library, program


def main(arguments: list[str]) -> int:
    cc = cross_compiler()
    if cc is None or shutil.which(EMULATOR) is None or not sys.platform.startswith("linux"):
        print("left out: needs qemu-user and gcc-aarch64-linux-gnu (apt-get install)", file=sys.stderr)
        return MISSING
    library, program = compiled(cc, HERE / "__pycache__")
    preload = HERE / "__pycache__/arena.so"
    command = ["cc", "-O2", "-shared", "-fPIC", "-pthread", str(HERE / "arena.c"), "-ldl", "-o", str(preload)]
    subprocess.run(command, check=True)
    with tempfile.NamedTemporaryFile(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as arena:
        arena.truncate(ARENA)
        server = [EMULATOR, "-L", SYSROOT, str(program), str(library), arena.name]
        environment = os.environ | {
            "SSMZOO_EMULATOR": json.dumps(server), "SSMZOO_ARENA": arena.name, "SSMZOO_NATIVE": "plain",
            "LD_PRELOAD": str(preload), "OMP_NUM_THREADS": "1", **({} if arguments else {"SSMZOO_EVERY_KERNEL": "1"}),
            "PYTHONPATH": os.pathsep.join([str(HERE), str(ROOT), str(ROOT / "tests")]),
        }  # fmt: skip
        files = [HERE / "test_kernels.py", *(ROOT / f"tests/ops/test_{name}.py" for name in TESTS)]
        chosen = arguments or ["-q", "-k", CHOSEN, *map(str, files)]
        command = [sys.executable, "-m", "pytest", "-p", "emulated_kernels", "-p", "no:cacheprovider", *chosen]
        return subprocess.run(command, env=environment, cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
