"""dense_scan of symbols on our GPU kernels (triton_kernels.py)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmzoo.ops.checks import why_not_float
from ssmzoo.ops.dense_scan import RESET, SKIP, SYMBOLS, Symbols, check_codes, dense_scan, scan
from ssmzoo.ops.library import Kernel
from ssmzoo.ops.triton import ALL_REGISTERS, DEVICE, MISSING, on_device_of, power_of_2
from ssmzoo.ops.triton.variants import Passes, Variant, meta, train

PASSES = {
    "forward": Passes(("R", "N", "N"), ("length",), most=60),
    "backward": Passes(("R", "N", "N"), ("length",), most=60),
    "products": Passes(("N", "N", "J"), ("length",), most=60),
    "transitions": Passes(("I", "N"), most=100),
}
TILE = 4096  # numbers of the transitions that a program holds, at most
WIDEST = 128  # states: their transition fills a program's registers
WIDEST_PRODUCT, COLUMNS = 64, 16  # states, and columns of a product that a program has
LONG, ENOUGH = 1024, 256  # steps from which strings are cut, and stretches that keep a large card busy
PARTS, STEPS, GRADIENT = 16, 16, 2048  # for the gradient of one transition: programs, steps and numbers of it at once
FLAGS = {"SKIP": SKIP, "RESET": RESET}


def _launch(codes: Tensor, T: Tensor) -> tuple[tuple[int], tuple[int, ...], dict]:
    """(grid, sizes, options)"""
    (b, l), (s, n, _) = codes.shape, T.shape
    N = power_of_2(n)
    R = max(1, min(power_of_2(b), TILE // N**2))
    options = FLAGS | ALL_REGISTERS | {"R": R, "N": N, "num_warps": max(1, min(8, R * N * N // 512))}
    return (-(-b // R),), (b, l, n, s), options


def _walk(T: Tensor, x: Tensor, codes: Tensor, first: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    """Last state (b n) and states (b l n), or (b 0 n), of the walk from `first`."""
    from ssmzoo.ops.dense_scan import triton_kernels as kernels

    last, states = torch.empty_like(first), x.new_empty(x.shape if keep else (len(x), 0, x.shape[2]))
    grid, sizes, options = _launch(codes, T)
    kernels.forward[grid](T, x, codes, first, states, last, *sizes, KEEP=keep, **options)
    return last, states


def _walk_back(T: Tensor, codes: Tensor, d_states: Tensor | None, d_last: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x (b l n) and of the first state (b n)."""
    from ssmzoo.ops.dense_scan import triton_kernels as kernels

    dx, d_first = T.new_empty(*codes.shape, T.shape[-1]), torch.empty_like(d_last)
    grid, sizes, options = _launch(codes, T)
    kernels.backward[grid](T, codes, d_states, d_last, dx, d_first, *sizes, **options)
    return dx, d_first


class _Stretches(NamedTuple):
    """What the walk over m stretches of each string needs: codes (b m) that stand for their products (b m n n), the
    codes of their steps (b m, q), the last stretch filled up with steps that leave the state alone."""

    products: Tensor
    codes: Tensor
    steps: Tensor

    def cut(self, t: Tensor | None) -> Tensor | None:
        """(b l n) -> (b m, q, n)"""
        if t is None:
            return None
        b, q = len(self.codes), self.steps.shape[1]
        return F.pad(t, (0, 0, 0, self.steps.numel() // b - t.shape[1])).view(-1, q, t.shape[2])


def _stretches(a: Symbols) -> _Stretches | None:
    """None for strings that are walked step by step."""
    from ssmzoo.ops.dense_scan import triton_kernels as kernels

    (b, l), (s, n, _) = a.codes.shape, a.T.shape
    m = min(l // 2, max(2, min(ENOUGH // b, int(2 * l**0.5)))) if a.parallel else 1
    if m < 2:
        return None
    q, N = -(-l // m), max(16, power_of_2(n))
    m, J = -(-l // q), min(N, COLUMNS)
    steps = F.pad(a.codes, (0, m * q - l), value=SKIP).view(b * m, q)
    products = a.T.new_empty(b * m, n, n)
    grid = (b * m * -(-n // J),)
    kernels.products[grid](a.T, steps, products, b * m, q, n, s, N=N, J=J, num_warps=8, **FLAGS)
    codes = torch.arange(b * m, device=a.codes.device, dtype=a.codes.dtype).view(b, m)
    return _Stretches(products, codes, steps)


def forward(a: Symbols, save: bool):
    if a.codes.is_cpu:
        check_codes(a.codes, a.T.shape[0])
    b, l, n = a.x.shape
    with on_device_of(a.x):
        cut = _stretches(a)
        if cut is None:
            return _walk(a.T, a.x, a.codes, a.h0, a.keep), None
        x = cut.cut(a.x)
        ends, _ = _walk(a.T, x, cut.steps, a.h0.new_zeros(len(x), n), False)
        last, before = _walk(cut.products, ends.view(b, -1, n), cut.codes, a.h0, True)
        if not a.keep:
            return (last, a.x.new_empty(b, 0, n)), None
        before = torch.cat([a.h0[:, None], before[:, :-1]], 1).flatten(0, 1)
        last, states = _walk(a.T, x, cut.steps, before, True)
    return (last.view(b, -1, n)[:, -1].contiguous(), states.view(b, -1, n)[:, :l].contiguous()), None


def backward(a: Symbols, states: Tensor, d_last: Tensor, d_states: Tensor | None) -> dict[str, Tensor]:
    from ssmzoo.ops.dense_scan import triton_kernels as kernels

    (b, l), (s, n, _) = a.codes.shape, a.T.shape
    d_states, d_last = None if d_states is None else d_states.contiguous(), d_last.contiguous()
    symbols, order = torch.where(a.codes < SKIP, a.codes, s).flatten().sort(stable=True)
    bounds = torch.searchsorted(symbols, torch.arange(s + 1, device=symbols.device, dtype=symbols.dtype))
    N = max(16, power_of_2(n))
    I, dT = min(N, GRADIENT // N), a.T.new_empty(PARTS, s, n, n)
    with on_device_of(a.x):
        cut = _stretches(a)
        if cut is None:
            dx, d_h0 = _walk_back(a.T, a.codes, d_states, d_last)
        else:
            d_steps = cut.cut(d_states)
            _, d_before = _walk_back(a.T, cut.steps, d_steps, d_last.new_zeros(len(cut.steps), n))
            d_before = F.pad(d_before.view(b, -1, n)[:, 1:], (0, 0, 0, 1))  # of a stretch's end, by later ones
            d_ends, _ = _walk_back(cut.products, cut.codes, d_before, d_last)
            dx, d_before = _walk_back(a.T, cut.steps, d_steps, d_ends.flatten(0, 1))
            dx, d_h0 = dx.view(b, -1, n)[:, :l].contiguous(), d_before.view(b, -1, n)[:, 0].contiguous()
        kernels.transitions[(s * PARTS * -(-n // I),)](
            order, bounds, dx, states, a.h0, dT, l, n, s, PARTS, K=STEPS, I=I, N=N, num_warps=4
        )
    return {"T": dT.sum(0), "x": dx, "h0": d_h0}


KERNEL = SYMBOLS.kernels["triton"] = Kernel(forward, backward)


def why_not(a) -> str | None:
    if a.symbols is None:
        return "takes transitions given by symbols; mixtures that differ at every step run in PyTorch"
    if a.A_dict.shape[0] > (most := WIDEST_PRODUCT if a.parallel else WIDEST):
        what = "products of transitions, which parallel=True asks for," if a.parallel else "transitions"
        return f"holds {what} of up to {most} states, got {a.A_dict.shape[0]}"
    if a.symbols.numel() == 0 or a.A_dict.numel() == 0:
        return "is given nothing to do"
    return why_not_float(a.A_dict, a.weights, a.inputs, a.initial_state)


def pays(a) -> bool:
    """Whether strings are so few and so long that products of transitions pay, n^3 work instead of n^2."""
    b, l = a.symbols.shape
    return l >= LONG and 2 * b <= ENOUGH and a.A_dict.shape[0] <= WIDEST_PRODUCT


dense_scan.register("triton", device=DEVICE, missing=MISSING, unsupported=why_not)(
    lambda a: scan(a, "triton", pays(a) if a.parallel is None else a.parallel)
)


def variants() -> Iterator[Variant]:
    def call(b, l, n, s=3, parallel=False):
        a = Symbols(meta(s, n, n), meta(b, l, n), meta(b, l, dtype=torch.int32), meta(b, n), True, parallel)
        return lambda: train(KERNEL, a, kept=1)

    yield Variant("b 128, l 40, n 64, 3 symbols", call(128, 40, 64), typical=True)
    for n in (8, 16, 32, 128):
        yield Variant(f"n {n}", call(256, 500, n))
    yield Variant("n 21, 5 strings", call(5, 11, 21))
    yield Variant("b 1, l 65536, n 64: stretches at once", call(1, 65536, 64, parallel=True), typical=True)
    for n in (5, 16, 32):
        yield Variant(f"n {n}: stretches at once", call(2, 4096, n, parallel=True))
