"""dense_scan of symbols on our GPU kernels (triton_kernels.py)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ssmzoo.ops.checks import why_not_float
from ssmzoo.ops.dense_scan import RESET, SKIP, SYMBOLS, Symbols, check_codes, dense_scan, empty_results, scan
from ssmzoo.ops.library import Kernel
from ssmzoo.ops.triton import DEVICE, MISSING, on_device_of, power_of_2
from ssmzoo.ops.triton.variants import Passes, Variant, meta, train

PASSES = {
    "forward": Passes(("R", "N", "N"), ("length",), most=60),
    "backward": Passes(("R", "N", "N"), ("length",), most=60),
    "transitions": Passes(("I", "N"), most=100),
}
TILE = 4096  # numbers of the transitions that a program holds, at most
WIDEST = 128  # states: their transition fills a program's registers
PARTS, STEPS, ROWS = 16, 16, 32  # for the gradient of one transition: programs, steps and rows of it at once


def _launch(a: Symbols) -> tuple[tuple[int], tuple[int, ...], dict]:
    """(grid, sizes, options)"""
    (b, l), (s, n, _) = a.codes.shape, a.T.shape
    N = power_of_2(n)
    R = max(1, min(power_of_2(b), TILE // N**2))
    options = {"SKIP": SKIP, "RESET": RESET, "R": R, "N": N, "num_warps": max(1, min(8, R * N * N // 512))}
    return (-(-b // R),), (b, l, n, s), options


def forward(a: Symbols, save: bool):
    from ssmzoo.ops.dense_scan import triton_kernels as kernels

    if a.codes.is_cpu:
        check_codes(a.codes, a.T.shape[0])
    last, states = empty_results(a)
    grid, sizes, options = _launch(a)
    with on_device_of(a.x):
        kernels.forward[grid](a.T, a.x, a.codes, a.h0, states, last, *sizes, KEEP=a.keep, **options)
    return (last, states), None


def backward(a: Symbols, states: Tensor, d_last: Tensor, d_states: Tensor | None) -> dict[str, Tensor]:
    from ssmzoo.ops.dense_scan import triton_kernels as kernels

    (_, l), (s, n, _) = a.codes.shape, a.T.shape
    d_states = None if d_states is None else d_states.contiguous()
    dx, d_h0 = torch.empty_like(states), torch.empty_like(a.h0)
    grid, sizes, options = _launch(a)
    symbols, order = torch.where(a.codes < SKIP, a.codes, s).flatten().sort(stable=True)
    bounds = torch.searchsorted(symbols, torch.arange(s + 1, device=symbols.device, dtype=symbols.dtype))
    N = max(16, power_of_2(n))
    I, dT = min(N, ROWS), a.T.new_empty(PARTS, s, n, n)
    with on_device_of(a.x):
        kernels.backward[grid](a.T, a.codes, d_states, d_last.contiguous(), dx, d_h0, *sizes, **options)
        kernels.transitions[(s * PARTS * -(-n // I),)](
            order, bounds, dx, states, a.h0, dT, l, n, s, PARTS, K=STEPS, I=I, N=N, num_warps=4
        )
    return {"T": dT.sum(0), "x": dx, "h0": d_h0}


KERNEL = SYMBOLS.kernels["triton"] = Kernel(forward, backward)


def why_not(a) -> str | None:
    if a.symbols is None:
        return "takes transitions given by symbols; mixtures that differ at every step run in PyTorch"
    if a.parallel:
        return "runs along time; parallel=True asks for products of transitions"
    if a.A_dict.shape[0] > WIDEST:
        return f"holds transitions of up to {WIDEST} states, got {a.A_dict.shape[0]}"
    if a.symbols.numel() == 0 or a.A_dict.numel() == 0:
        return "is given nothing to do"
    return why_not_float(a.A_dict, a.weights, a.inputs, a.initial_state)


dense_scan.register("triton", device=DEVICE, missing=MISSING, unsupported=why_not)(lambda a: scan(a, "triton", False))


def variants() -> Iterator[Variant]:
    def call(b, l, n, s=3):
        a = Symbols(meta(s, n, n), meta(b, l, n), meta(b, l, dtype=torch.int32), meta(b, n), True, False)
        return lambda: train(KERNEL, a, kept=1)

    yield Variant("b 128, l 40, n 64, 3 symbols", call(128, 40, 64), typical=True)
    for n in (8, 16, 32, 128):
        yield Variant(f"n {n}", call(256, 500, n))
    yield Variant("n 21, 5 strings", call(5, 11, 21))
