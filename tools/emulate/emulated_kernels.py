"""A pytest plugin: the "plain" kernels of this process are those of another architecture, run by its emulator.

Loaded by tools/emulate/run.py before anything else; SSMZOO_EMULATOR is the command that serves calls (serve.c).
"""

from __future__ import annotations

import ctypes
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

ARGUMENTS = 13
SERVER = subprocess.Popen(
    json.loads(os.environ["SSMZOO_EMULATOR"]),
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    env={k: v for k, v in os.environ.items() if k != "LD_PRELOAD"},
)
CALLS: dict[str, int] = {}  # of the emulated library, by function
HERE = ("ssmzoo_use_team", "ssmzoo_commit", "ssmzoo_gather")  # matters of this process's threads and memory
PROGRAMS = ("ssmzoo_token_step", "ssmzoo_decode")  # they read lists in memory of Python's, which is not shared
EVERY = "SSMZOO_EVERY_KERNEL" in os.environ  # a kernel that no call reaches is a failure


class Function:
    """A function of the emulated library, called as ctypes calls one."""

    def __init__(self, name: str):
        self.name, self.argtypes, self.restype = name, None, ctypes.c_int

    def __call__(self, *arguments):
        if self.name in HERE:
            return None
        if self.name == "ssmzoo_source_hash":
            return _source_hash().encode()
        values, blobs = [0] * ARGUMENTS, [b""] * ARGUMENTS
        for i, argument in enumerate(arguments):
            if isinstance(argument, (bytes, ctypes.Array)):
                blobs[i] = bytes(argument)
            else:
                values[i] = int(argument or 0)
        sizes = [len(blob) for blob in blobs]
        request = struct.pack(f"64s{2 * ARGUMENTS}q", self.name.encode(), *values, *sizes)
        SERVER.stdin.write(request + b"".join(blobs))
        SERVER.stdin.flush()
        found, result = struct.unpack("2q", self._read(16))
        for argument, blob in zip(arguments, blobs):
            back = self._read(len(blob))
            if isinstance(argument, ctypes.Array):
                ctypes.memmove(argument, back, len(back))
        if not found:
            raise AttributeError(f"the emulated kernels have no {self.name}")
        CALLS[self.name] = CALLS.get(self.name, 0) + 1
        return result

    def _read(self, count: int) -> bytes:
        data = SERVER.stdout.read(count) if count else b""
        if len(data) != count:
            raise OSError(f"the emulated process ended in {self.name}, status {SERVER.wait()}")
        return data


def _source_hash() -> str:
    """Of the sources that run.py has just compiled."""
    return sys.modules["ssmzoo.ops.native.sources"].source_hash()


class Library:
    def __init__(self):
        self._functions: dict[str, Function] = {}

    def __getattr__(self, name: str) -> Function:
        return self._functions.setdefault(name, Function(name))


LIBRARY, LOAD = Library(), ctypes.CDLL


class Loader(LOAD):
    def __new__(cls, name=None, *arguments, **keywords):
        if name and Path(str(name)).name == "_kernels.plain.so":
            return LIBRARY
        return LOAD(name, *arguments, **keywords)


ctypes.CDLL = Loader


def pytest_terminal_summary(terminalreporter) -> None:
    calls = ", ".join(f"{name.removeprefix('ssmzoo_')} {count}" for name, count in sorted(CALLS.items()))
    terminalreporter.write_line(f"calls of emulated kernels: {calls or 'none'}")
    if EVERY and unreached():
        terminalreporter.write_line(f"kernels that no call has reached: {', '.join(unreached())}")


def unreached() -> list[str]:
    """Functions of the library that the package has looked up and nobody called."""
    names = {name for name in LIBRARY._functions if name.startswith("ssmzoo_")}
    return sorted(names - set(CALLS) - {*HERE, *PROGRAMS, "ssmzoo_source_hash"})


def pytest_sessionfinish(session, exitstatus) -> None:
    if not CALLS or (EVERY and unreached()):
        session.exitstatus = 1
