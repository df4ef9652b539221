"""What a program that computes on large tensors asks of the allocator when it begins."""

from __future__ import annotations

import ctypes
import os
import sys


def keep_freed_memory() -> None:
    """Let glibc reuse large blocks instead of returning each to the kernel, which costs a page fault per 4 KiB.

    For programs, not for libraries: it is set where a run begins and left alone where the user has set MALLOC_*.
    """
    if not sys.platform.startswith("linux") or any(k.startswith("MALLOC_") for k in os.environ):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # not glibc
        return
    mmap_threshold, trim_threshold = -3, -1  # the names of M_MMAP_THRESHOLD and M_TRIM_THRESHOLD in malloc.h
    mallopt(mmap_threshold, 256 << 20)
    mallopt(trim_threshold, 1 << 30)
