"""ssd_scan and mamba_chunk_scan_combined on our GPU kernels (ssd_kernels.py).

PyTorch's form spends its time not in matrix products but in moving decays, (b h l q) numbers in fp32 that pass through
memory some ten times; here they never leave the chip. Products are taken in TF32, whose 10 bits are no fewer than those
of 16-bit inputs. For fp32 inputs that would be too few, and products of full precision do not fit into the registers
(compiled for sm_90, 6 to 8 kB of them spill per thread), so that these are left to PyTorch.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from ssmzoo.ops.checks import resets
from ssmzoo.ops.ssd import around_scan, mamba_chunk_scan_combined, ssd_scan
from ssmzoo.ops.ssd_op import KERNELS, SSDKernel, ssd_with
from ssmzoo.ops.triton import DEVICE, INTERPRETED, MISSING, on_device_of, power_of_2, strides, whole, why_not_float

STRETCH = 128  # positions between saved states
CHUNK = 32  # positions per chunk: divides STRETCH, at least 16; 64 spill five times as many registers
WIDEST, STATE_SIZE = 256, 4096  # states per channel, and numbers of a program's state, at most


def saved_shape(b: int, l: int, h: int, p: int, n: int) -> tuple[int, ...]:
    return -(-l // STRETCH), b, h, p, n


def _launch(x: Tensor, B: Tensor) -> tuple[tuple[int], int, tuple, dict]:
    """(grid, blocks per head, sizes, options)"""
    (b, l, h, p), (g, n) = x.shape, B.shape[2:]
    N = max(16, power_of_2(n))
    P = max(16, min(64, power_of_2(p), STATE_SIZE // N))
    blocks = -(-p // P)
    options = {
        "PRECISION": "ieee" if torch.version.hip else "tf32",
        "Q": CHUNK,
        "P": P,
        "N": N,
        "num_warps": 8,
        "num_stages": 1,
    }
    return (b * h * blocks,), blocks, (l, h, h // g, p, n, -(-l // STRETCH), STRETCH // CHUNK, b * h * p * n), options


def _segments(seq_idx: Tensor | None) -> Tensor | None:
    return None if seq_idx is None else resets(seq_idx).cumsum(1, dtype=torch.int32)


def forward(x, dt, a, B, C, D, initial_states, seq_idx, save):
    from ssmzoo.ops.triton import ssd_kernels as kernels

    (b, l, h, p), n = x.shape, B.shape[3]
    y, last = x.new_empty(x.shape), x.new_empty(b, h, p, n, dtype=torch.float32)
    saved = last.new_empty(saved_shape(b, l, h, p, n) if save else (0,))
    grid, _, sizes, options = _launch(x, B)
    with on_device_of(x):
        kernels.forward[grid](
            x,
            whole(dt),
            whole(a),
            B,
            C,
            whole(D),
            whole(initial_states),
            _segments(seq_idx),
            y,
            last,
            saved if save else None,
            *map(strides, (x, B, C, y)),
            *sizes,
            SAVE=save,
            **options,
        )
    return y, last, saved


def backward(dy, dlast, saved, x, dt, a, B, C, D, initial_states, seq_idx):
    from ssmzoo.ops.triton import ssd_kernels as kernels

    (b, l, h, p), (g, n) = x.shape, B.shape[2:]
    grid, blocks, sizes, options = _launch(x, B)
    new = functools.partial(x.new_empty, dtype=torch.float32)
    scratch, dx, da = new(STRETCH // CHUNK, b, h, p, n), x.new_empty(x.shape), new(blocks, b, l, h)
    dB, dC = (new(blocks, b, l, g, h // g, n) for _ in range(2))
    ddt = None if dt is None else new(blocks, b, l, h)
    dD = None if D is None else new(b, h, p)
    dfirst = None if initial_states is None else new(b, h, p, n)
    with on_device_of(x):
        kernels.backward[grid](
            x,
            whole(dt),
            whole(a),
            B,
            C,
            whole(D),
            _segments(seq_idx),
            saved,
            dy,
            whole(dlast),
            scratch,
            dx,
            ddt,
            da,
            dB,
            dC,
            dD,
            dfirst,
            *map(strides, (x, B, C, dy)),
            *sizes,
            b * l * h,
            b * l * h * n,
            **options,
        )
    grads = (
        dx,
        None if dt is None else ddt.sum(0),
        da.sum(0),
        dB.sum((0, 4)),
        dC.sum((0, 4)),
        None if D is None else dD.sum(0),
        dfirst,
    )
    return tuple(
        x.new_empty(0) if t is None else grad.to(t.dtype) for grad, t in zip(grads, (x, dt, a, B, C, D, initial_states))
    )


KERNELS["triton"] = SSDKernel(forward, backward, saved_shape)


def _why_not(x: Tensor, B: Tensor, *others: Tensor | None) -> str | None:
    if x.numel() == 0 or B.shape[3] == 0:
        return "is given nothing to do"
    if B.shape[3] > WIDEST:
        return f"holds up to {WIDEST} states per channel on the chip, got {B.shape[3]}"
    if not INTERPRETED and torch.float32 in (x.dtype, B.dtype):
        return "multiplies 16-bit inputs only; the torch form is exact for float32"
    return why_not_float(x, B, *others)


def _why_not_scan(X, a, B, C, initial_states=None, seq_idx=None, chunk_size=64):
    return _why_not(X, B, a, C, initial_states)


def _why_not_combined(
    x,
    dt,
    A,
    B,
    C,
    chunk_size=256,
    D=None,
    z=None,
    dt_bias=None,
    initial_states=None,
    seq_idx=None,
    dt_softplus=False,
    dt_limit=(0.0, math.inf),
    return_final_states=False,
):
    return _why_not(x, B, dt, A, C, D, z, dt_bias, initial_states)


@ssd_scan.register("triton", device=DEVICE, missing=MISSING, unsupported=_why_not_scan)
def ssd_scan_triton(X, a, B, C, initial_states=None, seq_idx=None, chunk_size=64):
    return ssd_with("triton", X, None, a, B, C, None, initial_states, seq_idx)


def _scan(x, dt, a, B, C, D, initial_states, seq_idx, chunk_size):
    return ssd_with("triton", x, dt, a, B, C, D, initial_states, seq_idx)


mamba_chunk_scan_combined.register("triton", device=DEVICE, missing=MISSING, unsupported=_why_not_combined)(
    functools.partial(around_scan, _scan)
)
