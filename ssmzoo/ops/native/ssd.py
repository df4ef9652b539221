"""ssd_scan and mamba_chunk_scan_combined on our compiled CPU kernels (ssd.c)."""

from __future__ import annotations

import ctypes
import functools
import math

import torch
from torch import Tensor

from ssmzoo.ops.checks import resets
from ssmzoo.ops.native import VECTOR_LENGTH, kernel, why_not_float
from ssmzoo.ops.ssd import around_scan, mamba_chunk_scan_combined, ssd_scan
from ssmzoo.ops.ssd_op import KERNELS, SSDKernel, ssd_with

FORWARD, MISSING = kernel("ssmzoo_ssd_forward")
BACKWARD, _ = kernel("ssmzoo_ssd_backward")
CHUNK = 64  # steps; the matrices of a chunk and the state of a head then fit into the second-level cache


def chunk_length(l: int) -> int:
    return max(1, min(CHUNK, l))


def saved_shape(b: int, l: int, h: int, p: int, n: int) -> tuple[int, ...]:
    return b, -(-l // chunk_length(l)), h, n, -(-p // VECTOR_LENGTH) * VECTOR_LENGTH


def _rows(t: Tensor) -> Tensor:
    """float32 with neighbouring elements along the last axis; other strides are taken as they are."""
    t = t.float()
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _whole(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.float().contiguous()


def _decays(a: Tensor, seq_idx: Tensor | None) -> Tensor:
    e = a.float().exp()
    return e.contiguous() if seq_idx is None else e.masked_fill(resets(seq_idx).unsqueeze(-1), 0).contiguous()


def _split(b: int, h: int, g: int, tasks: int) -> int:
    """Parts to cut the heads of every group into, for about so many tasks."""
    return max(1, min(h // g, -(-tasks // max(1, b * g))))


def _call(function, x: Tensor, B: Tensor, C: Tensor, split: int, tensors: list[Tensor | None]) -> None:
    b, l, h, p = x.shape
    g, n = B.shape[2:]
    values = (
        b,
        l,
        h,
        p,
        g,
        n,
        chunk_length(l),
        split,
        torch.get_num_threads(),
        *x.stride()[:3],
        *B.stride()[:3],
        *C.stride()[:3],
        *(0 if t is None else t.data_ptr() for t in tensors),
    )
    function((ctypes.c_int64 * len(values))(*values))


def forward(x, dt, a, B, C, D, initial_states, seq_idx, save):
    (b, l, h, p), (g, n) = x.shape, B.shape[2:]
    y, last = x.new_empty(b, l, h, p, dtype=torch.float32), x.new_empty(b, h, p, n, dtype=torch.float32)
    saved = y.new_empty(saved_shape(b, l, h, p, n) if save else (0,))
    x32, B, C, e = _rows(x), _rows(B), _rows(C), _decays(a, seq_idx)
    tensors = [x32, _whole(dt), e, B, C, _whole(D), _whole(initial_states), saved if save else None, y, last]
    _call(FORWARD, x32, B, C, _split(b, h, g, 4 * torch.get_num_threads()), tensors)
    return y.to(x.dtype), last, saved


def backward(dy, dlast, saved, x, dt, a, B, C, D, initial_states, seq_idx):
    (b, l, h, p), (g, n) = x.shape, B.shape[2:]
    x32, B32, C32, e = _rows(x), _rows(B), _rows(C), _decays(a, seq_idx)
    split = _split(b, h, g, 2 * torch.get_num_threads())

    def result(wanted: Tensor | None, *shape: int) -> Tensor | None:
        return None if wanted is None else x32.new_empty(shape)

    dx, da, ddt = result(x, b, l, h, p), result(a, b, l, h), result(dt, b, l, h)
    dB, dC, dD = result(B, split, b, l, g, n), result(C, split, b, l, g, n), result(D, b, h, p)
    dfirst = result(initial_states, b, h, p, n)
    tensors = [
        x32,
        _whole(dt),
        e,
        B32,
        C32,
        _whole(D),
        saved,
        _whole(dy),
        _whole(dlast),
        dx,
        ddt,
        da,
        dB,
        dC,
        dD,
        dfirst,
    ]
    _call(BACKWARD, x32, B32, C32, split, tensors)
    grads = (
        dx,
        ddt,
        da,
        dB.sum(0) if split > 1 else dB[0],
        dC.sum(0) if split > 1 else dC[0],
        None if dD is None else dD.sum(0),
        dfirst,
    )
    return tuple(
        x32.new_empty(0) if t is None else grad.to(t.dtype)
        for grad, t in zip(grads, (x, dt, a, B, C, D, initial_states))
    )


KERNELS["native"] = SSDKernel(forward, backward, saved_shape)


def _why_not_scan(X, a, B, C, initial_states=None, seq_idx=None, chunk_size=64):
    return why_not_float(X, a, B, C, initial_states)


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
    return why_not_float(x, dt, A, B, C, D, z, dt_bias, initial_states)


@ssd_scan.register("native", device="cpu", missing=MISSING, unsupported=_why_not_scan)
def ssd_scan_native(X, a, B, C, initial_states=None, seq_idx=None, chunk_size=64):
    return ssd_with("native", X, None, a, B, C, None, initial_states, seq_idx)


def _scan(x, dt, a, B, C, D, initial_states, seq_idx, chunk_size):
    return ssd_with("native", x, dt, a, B, C, D, initial_states, seq_idx)


mamba_chunk_scan_combined.register("native", device="cpu", missing=MISSING, unsupported=_why_not_combined)(
    functools.partial(around_scan, _scan)
)
