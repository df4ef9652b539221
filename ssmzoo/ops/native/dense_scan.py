"""dense_scan on our compiled CPU kernels (dense_scan.c): symbols in C, mixtures that differ by step in PyTorch."""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmzoo.ops import dense_scan_torch as on_torch
from ssmzoo.ops.dense_scan import dense_scan, scan_with
from ssmzoo.ops.dense_scan_op import KERNELS, DenseKernel
from ssmzoo.ops.native import VECTOR_LENGTH, kernel, why_not_float

FORWARD, MISSING = kernel("ssmzoo_dense_scan_forward")
BACKWARD, _ = kernel("ssmzoo_dense_scan_backward")


def _padded(T: Tensor) -> Tensor:
    """(s n n) with rows of whole vectors."""
    return F.pad(T, (0, -T.shape[-1] % VECTOR_LENGTH)).contiguous()


def _call(function, T: Tensor, codes: Tensor, tensors: list[Tensor | None]) -> bool:
    s, n, width = T.shape
    values = (
        *codes.shape,
        n,
        width,
        s,
        torch.get_num_threads(),
        0,
        T.data_ptr(),
        codes.data_ptr(),
        *(0 if t is None else t.data_ptr() for t in tensors),
    )
    arguments = (ctypes.c_int64 * len(values))(*values)
    function(arguments)
    return arguments[6] == 0


def symbols_forward(T, x, codes, h0, keep, parallel):
    b, l, n = x.shape
    states, last = x.new_empty(b, l if keep else 0, n), x.new_empty(b, n)
    if not _call(FORWARD, _padded(T.mT), codes, [x, h0, states if keep else None, last]):
        on_torch.check_codes(codes, T.shape[0])
    return states, last


def symbols_backward(T, states, codes, h0, d_states, d_last, parallel):
    rows = _padded(T)
    dx, d_h0, dT = torch.empty_like(states), torch.empty_like(h0), torch.empty_like(rows)
    _call(BACKWARD, rows, codes, [states, h0, d_states, d_last, dx, d_h0, dT])
    return dT[..., : T.shape[-1]].contiguous(), dx, d_h0


KERNELS["native"] = DenseKernel(symbols_forward, symbols_backward, on_torch.mixture_forward, on_torch.mixture_backward)


def _why_not(
    A_dict,
    weights,
    inputs,
    p_norm=1.0,
    symbols=None,
    *,
    initial_state=None,
    mask=None,
    seq_idx=None,
    all_steps=True,
    parallel=None,
):
    if symbols is None:
        return "compiled for transitions given by symbols; mixtures that differ at every step run in PyTorch"
    if parallel:
        return "runs along time; parallel=True asks for products of transitions"
    return why_not_float(A_dict, weights, inputs, initial_state)


dense_scan.register("native", device="cpu", missing=MISSING, unsupported=_why_not)(scan_with("native"))
