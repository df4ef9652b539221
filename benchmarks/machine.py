"""What a timing was taken on: processor, kernels, cores, memory bandwidth, and what other programs took meanwhile."""

from __future__ import annotations

import os
import platform
import resource
import time
from pathlib import Path

import torch

from ssmzoo.ops import native

BUSY = 0.15  # of the machine's cores taken by other programs: ratios of times are not to be trusted beyond


def cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def bandwidth(megabytes: int = 64, repeats: int = 5) -> float:
    """GB/s at which torch's threads read memory that no cache holds: the best of some sums."""
    x, best = torch.ones(megabytes << 18), float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        x.sum()
        best = min(best, time.perf_counter() - start)
    return 4 * x.numel() / best / 1e9


def describe() -> str:
    """One line. To be called in a process that times nothing: it starts torch's threads."""
    kernels = native.LEVEL or "none"
    torch_set = torch.backends.cpu.get_cpu_capability()
    return (
        f"{processor()}, {cores()} of {os.cpu_count()} cores, {torch.get_num_threads()} thread(s), kernels {kernels}, "
        f"torch {torch.__version__} with {torch_set}, reads {bandwidth():.1f} GB/s"
    )


class Others:
    """How much of the machine other programs take, since this was made; None where the system does not tell."""

    def __init__(self):
        self.start = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        """Seconds: of the clock, of all cores' work, of this process's and its children's."""
        stat = Path("/proc/stat")
        if not stat.exists():
            return None
        fields = [int(field) for field in stat.read_text().split("\n", 1)[0].split()[1:9]]
        busy = (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")  # but for idle and waiting for disks
        own = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return time.time(), busy, sum(usage.ru_utime + usage.ru_stime for usage in own)

    def share(self) -> float | None:
        """Of the time of all cores, 0 to 1."""
        now = self._now()
        if now is None or self.start is None or now[0] - self.start[0] < 0.05:
            return None
        clock, busy, own = (b - a for a, b in zip(self.start, now))
        return min(1.0, max(0.0, (busy - own) / (clock * (os.cpu_count() or 1))))


def warning(share: float | None) -> str:
    """A sentence where the machine was too busy to trust its times, else nothing."""
    if share is None or share <= BUSY:
        return ""
    cure = "" if torch.get_num_threads() == 1 else ", or with OMP_NUM_THREADS=1, which measures CPU time"
    return (
        f"Other programs took {share:.0%} of this machine's cores meanwhile: times are too long and ratios of them "
        f"uncertain; repeat it on a calm machine{cure}."
    )
