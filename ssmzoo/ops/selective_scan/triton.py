"""selective_scan_fn on our GPU kernels (triton_kernels.py)."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmzoo.ops.checks import resets, why_not_float
from ssmzoo.ops.library import Kernel
from ssmzoo.ops.selective_scan import empty_gradients, groups_of, register, why_not_complex
from ssmzoo.ops.triton import DEVICE, MISSING, on_device_of, power_of_2, strides, whole

CHANNELS, STEPS = 32, 32  # of a tile, at most; many channels keep the unfinished sums for dB and dC few
PER_THREAD = 4  # elements of a tile: more of them spill registers


def chunk_length(l: int) -> int:
    return min(STEPS, power_of_2(l))


def saved(a) -> Tensor:
    (b, e, l), n = a.u.shape, a.A.shape[1]
    return a.u.new_empty(-(-l // chunk_length(l)) + 1, b, e, n, dtype=torch.float32)


class _Launch:
    """Sizes of one call, as the kernels want them."""

    def __init__(self, a):
        self.b, self.e, self.l = a.u.shape
        self.n, self.g = a.A.shape[1], groups_of(a)
        self.size = self.e // self.g
        self.E, self.T = min(CHANNELS, power_of_2(self.size)), chunk_length(self.l)
        self.blocks, self.chunks = -(-self.size // self.E), -(-self.l // self.T)
        self.grid = (self.b * self.g * self.blocks,)
        self.sizes = (self.l, self.e, self.n, self.g, self.size, self.blocks, self.chunks, self.b * self.e * self.n)
        warps = max(1, min(8, self.E * self.T // (32 * PER_THREAD)))
        self.options = {
            "CONSTANT_B": a.B.ndim == 2,
            "CONSTANT_C": a.C.ndim == 2,
            "E": self.E,
            "T": self.T,
            "num_warps": warps,
            "num_stages": 1,
        }


def _arguments(a) -> list[Tensor | None]:
    B, C = (whole(M) if M.ndim == 2 else M for M in (a.B, a.C))
    fresh = None if a.seq_idx is None else resets(a.seq_idx).to(torch.int8)
    return [a.u, a.delta, whole(a.A), B, C, whole(a.D), a.z, whole(a.delta_bias), fresh]


def forward(a, save):
    from ssmzoo.ops.selective_scan import triton_kernels as kernels

    call, out = _Launch(a), torch.empty_like(a.u)
    states = saved(a) if save else a.u.new_empty(2, call.b, call.e, call.n, dtype=torch.float32)
    if a.initial_state is None:
        states[0] = 0
    else:
        states[0] = a.initial_state
    if call.grid[0] and call.chunks:
        tensors = _arguments(a)
        with on_device_of(a.u):
            kernels.forward[call.grid](
                *tensors,
                out,
                states,
                *map(strides, (a.u, a.delta, tensors[3], tensors[4], a.z, out)),
                *call.sizes,
                SOFTPLUS=a.delta_softplus,
                KEEP=save,
                **call.options,
            )
    last = states[call.chunks if save else call.chunks % 2].clone()
    return (out, last), states if save else None


def backward(a, states, dout, dlast_state):
    from ssmzoo.ops.selective_scan import triton_kernels as kernels

    call, grads = _Launch(a), empty_gradients(a)
    carries = states.new_zeros(2, *states.shape[1:])
    if dlast_state is not None:
        carries[call.chunks % 2] = dlast_state

    def unfinished(M: Tensor) -> Tensor:
        """Sums of chunks or blocks for the gradient of A, B or C."""
        if M.ndim == 2:
            return states.new_empty(call.chunks, *states.shape[1:])
        return states.new_empty(call.blocks, *M.shape)

    sums = {"A": unfinished(a.A), "B": unfinished(a.B), "C": unfinished(a.C)}
    for name, t in (("D", a.D), ("delta_bias", a.delta_bias)):
        sums[name] = None if t is None else states.new_empty(call.chunks, call.b, call.e)
    part = call.b * call.g * call.n * call.l
    if call.grid[0] and call.chunks:
        tensors, sequences = _arguments(a), (grads["u"], grads["delta"], grads.get("z"))
        with on_device_of(a.u):
            kernels.backward[call.grid](
                *tensors,
                states,
                dout,
                carries,
                *sequences,
                *sums.values(),
                *map(strides, (a.u, a.delta, tensors[3], tensors[4], a.z, dout, *sequences)),
                *call.sizes,
                part,
                SOFTPLUS=a.delta_softplus,
                **call.options,
            )
    for name, total in sums.items():
        if total is not None:
            grads[name].copy_(total.sum(0) if getattr(a, name).ndim == 4 else total.sum((0, 1)))
    if a.initial_state is not None:
        grads["initial_state"].copy_(carries[0])
    return grads


def why_not(a) -> str | None:
    return why_not_complex(a) or why_not_float(a.u, a.delta, a.A, a.B, a.C, a.D, a.z, a.delta_bias, a.initial_state)


register("triton", Kernel(forward, backward, saved), device=DEVICE, missing=MISSING, unsupported=why_not)
