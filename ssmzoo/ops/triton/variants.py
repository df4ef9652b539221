"""Which calls make an operator's launcher choose which kernels: with them, all are compiled without a GPU.

Every `<operator>/triton.py` has

    PASSES = {"forward": Passes(("E", "T"), ("chunks", "n_states"))}    # a line for every kernel of triton_kernels.py

    def variants() -> Iterator[Variant]:
        yield Variant("bf16, all options", lambda: train(KERNEL, arguments), typical=True)

`run` is called with tensors on torch's `meta` device, which have sizes and strides but no memory: it goes through the
launcher as a call on a GPU does, and benchmarks/gpu_static.py compiles what is launched, for every target.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ssmzoo.ops.library import Kernel

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Passes(NamedTuple):
    """What the loops of a kernel do.

    elements  constants of the kernel (their names) whose product is the number of elements of one innermost pass
    trips     how often its loops go round, the outermost first: names of its arguments, or numbers; none without a loop
    most      instructions per element of the innermost loop on sm_90 that are allowed in usual calls
    """

    elements: tuple[str, ...]
    trips: tuple[str | int, ...] = ()
    most: float = 100


class Variant(NamedTuple):
    """label; run: () -> anything, launches the kernels; default: the dispatcher comes here by itself; typical: a usual
    call at a usual size, of those that the estimate of times and the quick test take."""

    label: str
    run: Callable[[], object]
    default: bool = True
    typical: bool = False


def meta(*shape: int, dtype: torch.dtype = torch.float32, last: int | None = None) -> Tensor:
    """An empty tensor without memory; the axis `last`, if given, has its elements next to each other."""
    if last is None:
        return torch.empty(shape, dtype=dtype, device="meta")
    return meta(*(s for i, s in enumerate(shape) if i != last), shape[last], dtype=dtype).movedim(-1, last)


def train(kernel: Kernel, a: tuple, kept: int | None = None) -> None:
    """Launch forward, the forward that keeps nothing, and backward; `kept`: the result that is kept."""
    results, saved = kernel.forward(a, True)
    kernel.forward(a, False)
    saved = saved if kept is None else results[kept]
    kernel.backward(a, saved, *map(torch.empty_like, results))
