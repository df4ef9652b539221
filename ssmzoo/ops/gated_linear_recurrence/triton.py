"""gated_linear_recurrence on our GPU kernels (triton_kernels.py): one pass over memory each way."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from ssmzoo.ops.checks import why_not_float
from ssmzoo.ops.gated_linear_recurrence import RECURRENCE, gated_linear_recurrence
from ssmzoo.ops.library import Kernel
from ssmzoo.ops.triton import DEVICE, MISSING, on_device_of, power_of_2, whole
from ssmzoo.ops.triton.variants import Passes, Variant, meta, train

PASSES = {"forward": Passes(("T", "C"), ("tiles",), most=50), "backward": Passes(("T", "C"), ("tiles",), most=60)}
CHANNELS, STEPS = 64, 32  # of a tile


def _launch(a) -> tuple[tuple[int], tuple[int, ...], dict]:
    """(grid, sizes, options)"""
    b, l, n = a.x.shape
    C = min(CHANNELS, power_of_2(n))
    options = {"REVERSE": bool(a.reverse), "T": STEPS, "C": C, "num_warps": 4}
    return (b * -(-n // C),), (l, n, -(-l // STEPS)), options


def forward(a, save: bool):
    from ssmzoo.ops.gated_linear_recurrence import triton_kernels as kernels

    h = a.x.new_empty(a.x.shape)
    grid, sizes, options = _launch(a)
    with on_device_of(a.x):
        kernels.forward[grid](
            a.a, a.x, whole(a.initial_state), h, a.a.stride(), a.x.stride(), h.stride(), *sizes, **options
        )
    return (h,), None


def backward(a, h: Tensor, dh: Tensor) -> dict[str, Tensor]:
    from ssmzoo.ops.gated_linear_recurrence import triton_kernels as kernels

    da, dx = h.new_empty(h.shape), h.new_empty(h.shape)
    h = h.contiguous()
    grid, sizes, options = _launch(a)
    with on_device_of(h):
        kernels.backward[grid](
            a.a, whole(a.initial_state), h, dh, da, dx, a.a.stride(), h.stride(), dh.stride(), *sizes, **options
        )
    found = {"a": da, "x": dx}
    if a.initial_state is not None:
        end = a.x.shape[1] - 1 if a.reverse else 0
        found["initial_state"] = a.a[:, end] * dx[:, end]
    return found


KERNEL = RECURRENCE.kernels["triton"] = Kernel(forward, backward)


def why_not(a) -> str | None:
    if a.x.numel() == 0:
        return "has nothing to do for empty inputs"
    return why_not_float(a.a, a.x, a.initial_state)


@gated_linear_recurrence.register("triton", device=DEVICE, missing=MISSING, unsupported=why_not)
def gated_linear_recurrence_triton(a) -> Tensor:
    first = None if a.initial_state is None else a.initial_state.float()
    return RECURRENCE(a._replace(a=a.a.float(), x=a.x.float(), initial_state=first), "triton")


def variants() -> Iterator[Variant]:
    def call(b, l, n, reverse=False, first=False):
        a = RECURRENCE.Inputs(
            meta(b, l, n), meta(b, l, n), initial_state=meta(b, n) if first else None, reverse=reverse
        )
        return lambda: train(KERNEL, a, kept=0)

    yield Variant("b 8, l 2048, n 2048", call(8, 2048, 2048), typical=True)
    yield Variant("backwards in time", call(8, 2048, 2048, True, True))
    yield Variant("n 5", call(3, 100, 5, first=True))
