"""selective_scan_fn on our GPU kernels (selective_scan_kernels.py)."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmzoo.ops.checks import resets
from ssmzoo.ops.selective_scan import selective_scan_fn
from ssmzoo.ops.selective_scan_op import KERNELS, ScanKernel, empty_gradients, scan_with
from ssmzoo.ops.triton import DEVICE, MISSING, on_device_of, power_of_2, strides, whole, why_not_float

CHANNELS, STEPS = 32, 32  # of a tile, at most; many channels keep the unfinished sums for dB and dC few
PER_THREAD = 4  # elements of a tile: more of them spill registers


def chunk_length(l: int) -> int:
    return min(STEPS, power_of_2(l))


def saved_shape(b: int, e: int, l: int, n: int) -> tuple[int, ...]:
    return -(-l // chunk_length(l)) + 1, b, e, n


class _Launch:
    """Sizes of one call, as the kernels want them."""

    def __init__(self, u, A, B, C):
        self.b, self.e, self.l = u.shape
        self.n = A.shape[1]
        self.g = next((M.shape[1] for M in (B, C) if M.ndim == 4), 1)
        self.size = self.e // self.g
        self.E, self.T = min(CHANNELS, power_of_2(self.size)), chunk_length(self.l)
        self.blocks, self.chunks = -(-self.size // self.E), -(-self.l // self.T)
        self.grid = (self.b * self.g * self.blocks,)
        self.sizes = (self.l, self.e, self.n, self.g, self.size, self.blocks, self.chunks, self.b * self.e * self.n)
        warps = max(1, min(8, self.E * self.T // (32 * PER_THREAD)))
        self.options = {
            "CONSTANT_B": B.ndim == 2,
            "CONSTANT_C": C.ndim == 2,
            "E": self.E,
            "T": self.T,
            "num_warps": warps,
            "num_stages": 1,
        }


def _arguments(u, delta, A, B, C, D, z, delta_bias, seq_idx) -> list[Tensor | None]:
    B, C = (whole(M) if M.ndim == 2 else M for M in (B, C))
    fresh = None if seq_idx is None else resets(seq_idx).to(torch.int8)
    return [u, delta, whole(A), B, C, whole(D), z, whole(delta_bias), fresh]


def forward(u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx, delta_softplus, save):
    from ssmzoo.ops.triton import selective_scan_kernels as kernels

    call = _Launch(u, A, B, C)
    out = torch.empty_like(u)
    states = u.new_empty(call.chunks + 1 if save else 2, call.b, call.e, call.n, dtype=torch.float32)
    if initial_state is None:
        states[0] = 0
    else:
        states[0] = initial_state
    if call.grid[0] and call.chunks:
        tensors = _arguments(u, delta, A, B, C, D, z, delta_bias, seq_idx)
        with on_device_of(u):
            kernels.forward[call.grid](
                *tensors,
                out,
                states,
                *map(strides, (u, delta, B, C, z, out)),
                *call.sizes,
                SOFTPLUS=delta_softplus,
                KEEP=save,
                **call.options,
            )
    last = states[call.chunks if save else call.chunks % 2].clone()
    return out, last, states if save else states.new_empty(0)


def backward(dout, dlast_state, saved, u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx, delta_softplus):
    from ssmzoo.ops.triton import selective_scan_kernels as kernels

    call = _Launch(u, A, B, C)
    grads = empty_gradients(u, delta, A, B, C, D, z, delta_bias, initial_state)
    du, ddelta, dz = grads[0], grads[1], None if z is None else grads[6]
    carries = saved.new_zeros(2, *saved.shape[1:])
    if dlast_state is not None:
        carries[call.chunks % 2] = dlast_state

    def sums(M: Tensor) -> Tensor:
        """Unfinished sums for the gradient of A, B or C."""
        if M.ndim == 2:
            return saved.new_empty(call.chunks, *saved.shape[1:])
        return saved.new_empty(call.blocks, *M.shape)

    dA, dB, dC = sums(A), sums(B), sums(C)
    dD, dbias = (None if t is None else saved.new_empty(call.chunks, call.b, call.e) for t in (D, delta_bias))
    part = call.b * call.g * call.n * call.l
    if call.grid[0] and call.chunks:
        tensors = _arguments(u, delta, A, B, C, D, z, delta_bias, seq_idx)
        with on_device_of(u):
            kernels.backward[call.grid](
                *tensors,
                saved,
                dout,
                carries,
                du,
                ddelta,
                dz,
                dA,
                dB,
                dC,
                dD,
                dbias,
                *map(strides, (u, delta, B, C, z, dout, du, ddelta, dz)),
                *call.sizes,
                part,
                SOFTPLUS=delta_softplus,
                **call.options,
            )
    for index, total, argument in ((2, dA, A), (3, dB, B), (4, dC, C), (5, dD, D), (7, dbias, delta_bias)):
        if argument is not None:
            grads[index].copy_(total.sum(0) if argument.ndim == 4 else total.sum((0, 1)))
    if initial_state is not None:
        grads[8].copy_(carries[0])
    return tuple(grads)


def why_not(
    u,
    delta,
    A,
    B,
    C,
    D=None,
    z=None,
    delta_bias=None,
    delta_softplus=False,
    return_last_state=False,
    *,
    initial_state=None,
    seq_idx=None,
) -> str | None:
    if A.is_complex():
        return "complex A runs on the reference backend only"
    return why_not_float(u, delta, A, B, C, D, z, delta_bias, initial_state)


KERNELS["triton"] = ScanKernel(forward, backward, saved_shape)
selective_scan_fn.register("triton", device=DEVICE, missing=MISSING, unsupported=why_not)(scan_with("triton"))
