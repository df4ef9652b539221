"""What our GPU kernels in Triton share: no compiler to install, nothing tied to a version of PyTorch.

`<operator>/triton.py` registers the backend and launches, `<operator>/triton_kernels.py` holds the kernels and is
imported with the first call. With TRITON_INTERPRET=1 Triton runs them in Python on CPU tensors, slowly: that is how
they are tested.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os

import torch
from torch import Tensor

OLDEST = (3, 2)  # the first with tuples among a kernel's arguments
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
# of a launch: otherwise ptxas spills a few registers where one more block fits then; AMD's compiler has no such option
ALL_REGISTERS = {} if torch.version.hip else {"maxnreg": 255}


def _why_missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; `pip install triton` (Linux; triton-windows elsewhere)"
    if not INTERPRETED and torch.version.cuda is None and torch.version.hip is None:
        return None  # no GPU tensor can exist: Triton's import is spared
    try:
        import triton
        import triton.language  # noqa: F401
    except Exception as error:  # whatever a broken install raises, the other backends still serve
        return f"triton is installed but cannot be imported ({type(error).__name__}: {error})"
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < OLDEST:
        return f"triton {triton.__version__} is too old, expected {'.'.join(map(str, OLDEST))} or newer"
    return None


MISSING = _why_missing()


def on_device_of(t: Tensor):
    """Kernels are launched on the current device: make it the tensor's."""
    return torch.cuda.device(t.device) if t.is_cuda else contextlib.nullcontext()


def power_of_2(x: int) -> int:
    """The smallest power of 2 not below x, at least 1."""
    return 1 << max(0, x - 1).bit_length()


def whole(t: Tensor | None) -> Tensor | None:
    """Small parameters as the kernels read them: fp32, contiguous."""
    return None if t is None else t.float().contiguous()


def strides(t: Tensor | None) -> tuple[int, ...]:
    return (0,) if t is None else t.stride()
