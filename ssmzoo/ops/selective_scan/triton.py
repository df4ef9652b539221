"""selective_scan_fn on our GPU kernels (triton_kernels.py)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ssmzoo.ops.checks import resets, why_not_float
from ssmzoo.ops.library import Kernel
from ssmzoo.ops.selective_scan import empty_gradients, groups_of, register, selective_scan_fn, why_not_complex
from ssmzoo.ops.triton import ALL_REGISTERS, DEVICE, MISSING, on_device_of, power_of_2, strides, whole
from ssmzoo.ops.triton.variants import DTYPES, Passes, Variant, meta, train

PASSES = {
    "forward": Passes(("E", "T"), ("per", "n_states"), most=60),
    "backward": Passes(("E", "T"), ("per", "n_states"), most=160),
    "summaries": Passes(("E", "T"), ("per", "n_states"), most=60),
    "enter": Passes(("N",), ("segments",), most=60),
}
CHANNELS, STEPS = 16, 32  # of a tile, at most
PER_THREAD = (4, 2)  # elements of a tile, forward and backward: more of them spill registers
ENOUGH = 264  # programs that keep a large card busy; fewer are cut into segments along time
SHORTEST = 8  # chunks of a segment, at least


class Scan(NamedTuple):
    """What the kernels compute: sequences u, delta, z (b g p l) with any strides, group stride 0 for shared channels;
    A (g p, n); B, C (g p, n) or (b g n l); D, bias (g p); fresh (b l) int8; first state (b, g p, n); all parameters in
    fp32. map: None, or (rows, columns, flips, turns): see triton_kernels.py."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    bias: Tensor | None
    fresh: Tensor | None
    first: Tensor | None
    softplus: bool
    map: tuple[int, int, int, int] | None = None


class Launch:
    """Sizes and places of one scan, as the kernels want them."""

    def __init__(self, a: Scan, back: bool = False):
        self.a = a
        b, g, size, l = a.u.shape
        n = a.A.shape[1]
        self.E, self.T = min(CHANNELS, power_of_2(size)), chunk_length(l)
        self.blocks, self.chunks = -(-size // self.E), -(-l // self.T)
        programs = b * g * self.blocks
        cut = min(-(-ENOUGH // max(1, programs)), self.chunks // SHORTEST) if programs < ENOUGH else 1
        self.per = -(-self.chunks // max(1, cut))
        self.segments = -(-self.chunks // max(1, self.per))
        self.grid = (programs, self.segments)
        self.state = (b, g * size, n)
        self.slot, self.part = b * g * size * n, b * g * n * l
        warps = max(1, min(8, self.E * self.T // (32 * PER_THREAD[back])))
        if back:  # a short tile in fewer spills registers
            warps = max(warps, min(4, self.E * self.T // 32))
        self.sizes = (l, g * size, n, g, size, self.blocks, self.chunks, self.per, self.slot, *(a.map or (1, 1, 0, 0)))
        self.options = {"MAP": a.map is not None, "E": self.E, "T": self.T, "num_warps": warps, "num_stages": 1}
        if self.segments > 1 or back or a.fresh is not None:  # few programs, or spills where one more block fits
            self.options |= ALL_REGISTERS
        self.constant = {"CONSTANT_B": a.B.ndim == 2, "CONSTANT_C": a.C.ndim == 2}

    def new(self, *shape: int) -> Tensor:
        return self.a.u.new_empty(shape, dtype=torch.float32)

    @property
    def work(self) -> bool:
        return bool(self.grid[0] and self.chunks)

    def enter(self, kernels, states: Tensor, hop: int, dout: Tensor | None = None) -> None:
        """Fill in the states before every segment, or with `dout` the gradients behind it; the first one is there."""
        if self.segments < 2:
            return
        a, reverse = self.a, dout is not None
        value, M, z = (a.u, a.B, None) if dout is None else (dout, a.C, a.z)
        made = self.new(self.segments, *self.state)
        passed, kept = self.new(self.segments, *self.state[:2]), self.new(self.segments, *self.state[:2])
        options = self.options
        if M.ndim == 2:  # 4 warps spill registers on sm_100
            options = options | {"num_warps": max(1, min(8, self.E * self.T // 64))}
        kernels.summaries[self.grid](
            value,
            a.delta,
            a.A,
            M,
            z,
            a.bias,
            a.fresh,
            made,
            passed,
            kept,
            *map(strides, (value, a.delta, M, z)),
            *self.sizes,
            SOFTPLUS=a.softplus,
            CONSTANT=M.ndim == 2,
            REVERSE=reverse,
            **options,
        )
        size = 256
        kernels.enter[(-(-self.slot // size),)](
            a.A,
            made,
            passed,
            kept,
            states,
            self.segments,
            *self.state[1:],
            self.slot,
            hop,
            REVERSE=reverse,
            N=size,
            num_warps=4,
        )


def chunk_length(l: int) -> int:
    return min(STEPS, power_of_2(l))


def slots(b: int, e: int, n: int, l: int, like: Tensor) -> Tensor:
    """Uninitialised states before every chunk and after the last."""
    return like.new_empty(-(-l // chunk_length(l)) + 1, b, e, n, dtype=torch.float32)


def scan(a: Scan, out: Tensor, save: bool) -> tuple[Tensor, Tensor | None]:
    """Writes `out` (b g p l) and returns the last state and, with `save`, the states before every chunk."""
    from ssmzoo.ops.selective_scan import triton_kernels as kernels

    call = Launch(a)
    states = slots(*call.state, a.u.shape[3], a.u) if save else call.new(2 * max(1, call.segments), *call.state)
    if a.first is None:
        states[0] = 0
    else:
        states[0] = a.first
    if call.work:
        with on_device_of(a.u):
            call.enter(kernels, states, call.per if save else 2)
            kernels.forward[call.grid](
                *a[:9],
                out,
                states,
                *map(strides, (a.u, a.delta, a.B, a.C, a.z, out)),
                *call.sizes,
                SOFTPLUS=a.softplus,
                KEEP=save,
                **call.constant,
                **call.options,
            )
    rest = call.chunks - (call.segments - 1) * call.per  # chunks of the last segment
    last = call.chunks if save else 2 * (call.segments - 1) + rest % 2 if call.work else 0
    return states[last].clone(), states if save else None


def gradients(
    a: Scan, states: Tensor, dout: Tensor, dlast: Tensor | None, du: Tensor, ddelta: Tensor, dz: Tensor | None
) -> dict[str, Tensor]:
    """Writes du, ddelta, dz (b g p l) and returns the gradients of A, B, C, D, bias and the first state in fp32."""
    from ssmzoo.ops.selective_scan import triton_kernels as kernels

    call = Launch(a, back=True)
    carries = call.new(2 * max(1, call.segments), *call.state)
    entry = 2 * max(0, call.segments - 1)
    if dlast is None:
        carries[entry] = 0
    else:
        carries[entry] = dlast

    def unfinished(M: Tensor) -> Tensor:
        """Sums of chunks or blocks for the gradient of A, B or C."""
        return call.new(call.chunks, *call.state) if M.ndim == 2 else call.new(call.blocks, *M.shape)

    sums = {"A": unfinished(a.A), "B": unfinished(a.B), "C": unfinished(a.C)}
    for name, t in (("D", a.D), ("bias", a.bias)):
        sums[name] = None if t is None else call.new(call.chunks, *call.state[:2])
    if call.work:
        with on_device_of(a.u):
            call.enter(kernels, carries, 2, dout)
            kernels.backward[call.grid](
                *a[:9],
                states,
                dout,
                carries,
                du,
                ddelta,
                dz,
                *sums.values(),
                *map(strides, (a.u, a.delta, a.B, a.C, a.z, dout, du, ddelta, dz)),
                *call.sizes,
                call.part,
                SOFTPLUS=a.softplus,
                **call.constant,
                **call.options,
            )
    steps = {"B": a.B.ndim == 4, "C": a.C.ndim == 4}
    found = {n: t.sum(0) if steps.get(n) else t.sum((0, 1)) for n, t in sums.items() if t is not None}
    return found | {"first": carries[min(call.per, call.chunks) % 2]}


def _scan_of(a) -> Scan:
    e, g = a.u.shape[1], groups_of(a)

    def grouped(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.unflatten(1, (g, e // g))

    B, C = (whole(M) if M.ndim == 2 else M for M in (a.B, a.C))
    fresh = None if a.seq_idx is None else resets(a.seq_idx).to(torch.int8)
    sequences = grouped(a.u), grouped(a.delta), grouped(a.z)
    return Scan(
        *sequences[:2],
        whole(a.A),
        B,
        C,
        whole(a.D),
        sequences[2],
        whole(a.delta_bias),
        fresh,
        a.initial_state,
        a.delta_softplus,
    )


def saved(a) -> Tensor:
    (b, e, l), n = a.u.shape, a.A.shape[1]
    return slots(b, e, n, l, a.u)


def forward(a, save: bool):
    call, out = _scan_of(a), torch.empty_like(a.u)
    last, states = scan(call, out.unflatten(1, call.u.shape[1:3]), save)
    return (out, last), states


def backward(a, states: Tensor, dout: Tensor, dlast: Tensor | None) -> dict[str, Tensor]:
    call, grads = _scan_of(a), empty_gradients(a)
    du, ddelta, dz, d = (
        None if t is None else t.unflatten(1, call.u.shape[1:3])
        for t in (grads["u"], grads["delta"], grads.get("z"), dout)
    )
    found = gradients(call, states, d, dlast, du, ddelta, dz)
    names = {"bias": "delta_bias", "first": "initial_state"}
    for name, total in found.items():
        name = names.get(name, name)
        if name in grads:
            grads[name].copy_(total)
    return grads


def why_not(a) -> str | None:
    return why_not_complex(a) or why_not_float(a.u, a.delta, a.A, a.B, a.C, a.D, a.z, a.delta_bias, a.initial_state)


KERNEL = Kernel(forward, backward, saved)
register("triton", KERNEL, device=DEVICE, missing=MISSING, unsupported=why_not)


def variants() -> Iterator[Variant]:
    def call(dtype="bf16", sizes=(8, 2048, 2048, 16), last=False, more=True, constant=(), packs=False):
        """All optional arguments with `more`, channels next to each other with `last`, B or C constant in time."""
        (b, e, l, n), kind = sizes, DTYPES[dtype]

        def sequence():
            return meta(b, e, l, dtype=kind, last=1 if last else None)

        a = dict(u=sequence(), delta=sequence(), A=meta(e, n), delta_softplus=True)
        a |= {M: meta(e, n) if M in constant else meta(b, 1, n, l, dtype=kind) for M in "BC"}
        if more:
            a |= dict(z=sequence(), D=meta(e), delta_bias=meta(e))
        if packs:
            a |= dict(seq_idx=meta(b, l, dtype=torch.int32), initial_state=meta(b, e, n))
        a = selective_scan_fn.Arguments(**a)
        return lambda: train(KERNEL, a)

    usual = dict(last=True)
    yield Variant("bf16, channels last, b 8, e 2048, l 2048, n 16", call(**usual), typical=True)
    yield Variant("bf16, channels last, packed", call(packs=True, **usual))
    yield Variant("bf16", call())
    yield Variant("bf16, packed", call(packs=True))
    for dtype in ("fp16", "fp32"):
        yield Variant(f"{dtype}, channels last, packed", call(dtype, packs=True, **usual))
    yield Variant("fp32", call("fp32"))
    yield Variant("bf16, nothing optional", call(more=False))
    yield Variant("bf16, B constant", call(constant="B"))
    yield Variant("bf16, B and C constant, packed", call(constant="BC", packs=True))
    yield Variant("bf16, 7 steps", call(sizes=(8, 2048, 7, 16), packs=True))
    yield Variant("bf16, 1 step", call(sizes=(8, 2048, 1, 16)))
    long = dict(sizes=(1, 2048, 65536, 16))
    yield Variant("bf16, channels last, b 1, e 2048, l 65536, n 16", call(**long, **usual), typical=True)
    yield Variant("bf16, l 65536, packed", call(packs=True, **long))
    yield Variant("fp32, l 65536, B and C constant, packed", call("fp32", constant="BC", packs=True, **long))
    yield Variant("bf16, 5 channels", call(sizes=(2, 5, 100, 3), last=True))
