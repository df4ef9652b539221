"""`python ARGUMENTS` in processes forked from one that has imported the libraries, which takes a start its seconds."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile

# what a training imports, nothing of ours: a test may run a copy of the package
LIBRARIES = ["torch._inductor.config", "torch.distributed.fsdp", "lightning.pytorch", "hydra.core.utils"]
LIBRARIES += ["hydra._internal.hydra", "matplotlib.pyplot", "matplotlib.backends.backend_agg", "safetensors.torch"]
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(LIBRARIES)


class Python:
    """As subprocess.Popen([sys.executable, *arguments], cwd=cwd, env=env, stdout=PIPE, stderr=STDOUT, text=True)."""

    def __init__(self, *arguments, cwd, env):
        self.printed = tempfile.NamedTemporaryFile()
        self.process = context.Process(
            target=_become, args=(list(map(str, arguments)), str(cwd), dict(env), self.printed.name)
        )
        self.process.start()

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    poll = returncode.fget

    def send_signal(self, number: int) -> None:
        if self.process.is_alive():
            os.kill(self.process.pid, number)

    def wait(self, timeout: float = 1200) -> int:
        self.process.join(timeout)
        if self.returncode is None:
            self.send_signal(signal.SIGKILL)
            raise TimeoutError(f"it runs after {timeout} s")
        return self.returncode

    def communicate(self, timeout: float = 1200) -> str:
        """All that it printed, once it has ended."""
        self.wait(timeout)
        return self.printed.read().decode()


def run(*arguments, cwd, env) -> tuple[int, str]:
    """(exit status, what was printed)"""
    process = Python(*arguments, cwd=cwd, env=env)
    return process.wait(), process.communicate()


def stop() -> None:
    """Wait for the process that forks the others: its seconds are counted among those of this one's children."""
    multiprocessing.forkserver._forkserver._stop()


def _become(arguments: list[str], cwd: str, env: dict[str, str], printed: str) -> None:
    with open(printed, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    multiprocessing.process._parent_process = None  # a program of its own, nobody's worker
    multiprocessing.current_process().name = "MainProcess"
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    import torch

    torch.set_num_threads(int(env.get("OMP_NUM_THREADS", torch.get_num_threads())))
    installed = [p for p in sys.path if p.startswith((sys.prefix, sys.base_prefix))]
    first = os.path.dirname(os.path.abspath(arguments[0])) if arguments[0][0] != "-" else ""
    sys.path[:] = [first, *filter(None, env.get("PYTHONPATH", "").split(os.pathsep)), *installed]
    sys.argv = arguments
    try:
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        elif arguments[0] == "-c":
            sys.argv = ["-c", *arguments[2:]]
            exec(arguments[1], {"__name__": "__main__"})
        else:
            runpy.run_path(arguments[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()
