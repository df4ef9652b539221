"""Worker processes that die (killed for memory, say) are replaced, and no sample is lost or repeated."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import DataLoader

ATTEMPTS = 3  # deaths without a single batch in between, after which the run ends
DEATH = ("exited unexpectedly", "is killed by signal")  # what torch says of a worker that is gone


def quiet_worker(worker: int) -> None:
    """Ctrl-C and SIGUSR1 go to all processes of a terminal or job; what to do about them is the trainer's decision."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def replacing(make: Callable[[], DataLoader]) -> Iterator[Any]:
    """Batches of `make()`; when a worker dies, those of a new `make()`, which must begin at the next batch.

    Raises RuntimeError when workers die three times without giving a batch.
    """
    deaths = 0
    while True:
        batches = _without_alarm(make())
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except RuntimeError as error:
                if not any(words in str(error) for words in DEATH):
                    raise
                deaths += 1
                reason = str(error).splitlines()[0]
                break
            deaths = 0
            yield batch
        del batches  # ends the workers that are left
        if deaths >= ATTEMPTS:
            raise RuntimeError(
                f"data workers died {deaths} times in a row ({reason}). Most often memory runs out: lower "
                f"data.num_workers or data.batch_size, or give the machine more shared memory (/dev/shm); "
                f"data.num_workers=0 shows an error in the data itself"
            )
        print(f"warning: {reason}; starting new ones at the same batch ({deaths} of {ATTEMPTS - 1})", flush=True)


def _without_alarm(loader: DataLoader) -> Iterator[Any]:
    """An iterator whose dead workers are noticed when a batch is asked for.

    torch sets a handler of SIGCHLD that raises wherever the program is, in the middle of a training step too.
    """
    if not loader.num_workers or threading.current_thread() is not threading.main_thread():
        return iter(loader)
    before = signal.getsignal(signal.SIGCHLD)
    batches = iter(loader)
    torchs = getattr(before, "__module__", None) == "torch.utils.data._utils.signal_handling"
    signal.signal(signal.SIGCHLD, signal.SIG_DFL if torchs else before)
    return batches
