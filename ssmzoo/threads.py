"""How the threads of a program wait, and whether other programs want the same cores.

Threads of OpenMP spin for milliseconds at the end of every parallel piece of work, in case there is more. Where another
program wants the core, the thread that all wait for is then the one that does not run: on two cores with ten programs
a small training step took 0.5 to 1.1 s, and 12 to 21 ms with threads that soon sleep (`benchmarks/sharing.py`).
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # any of them set: the user has decided
SPINS = {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "0"}  # rounds, some 10 microseconds; milliseconds
PATIENCE = 0.1  # seconds of looking at what other programs do


def wait_asleep() -> None:
    """Have threads that wait for work go to sleep soon. For programs, before torch is imported; else without effect."""
    if "torch" not in sys.modules and not any(name in os.environ for name in SETTINGS):
        os.environ.update(SPINS)


def busy_cores() -> float | None:
    """Cores that are at work, over a tenth of a second in which the caller sleeps; None where the system won't tell."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None

    def worked() -> int:
        fields = [int(field) for field in stat.read_text().split("\n", 1)[0].split()[1:9]]
        return sum(fields) - fields[3] - fields[4]  # but for idle and waiting for disks

    start, before = time.perf_counter(), worked()
    time.sleep(PATIENCE)
    return (worked() - before) / os.sysconf("SC_CLK_TCK") / (time.perf_counter() - start)


def sharing(threads: int) -> str:
    """A sentence where other programs are on the cores that `threads` threads of this one are about to use, else ""."""
    cores, busy = os.cpu_count() or 1, busy_cores()
    if busy is None or threads < 2 or busy + threads < cores + 0.5:
        return ""
    how = (
        ", ".join(f"{name}={os.environ[name]}" for name in SETTINGS if name in os.environ)
        or "spin, as is their default"
    )
    return (
        f"other programs are on {busy:.1f} of {cores} cores, this one has {threads} threads (waiting: {how}); "
        f"OMP_NUM_THREADS=1 leaves the rest to the others"
    )
