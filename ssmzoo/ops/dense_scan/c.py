"""dense_scan on our compiled CPU kernels (dense_scan.c, column_norm.c)."""

from __future__ import annotations

import ctypes
import struct

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmzoo.ops.checks import why_not_float
from ssmzoo.ops.dense_scan import (
    MIX,
    SYMBOLS,
    Mixing,
    Symbols,
    check_codes,
    dense_scan,
    empty_results,
    mixed,
    scan,
    unmixed,
)
from ssmzoo.ops.library import Kernel
from ssmzoo.ops.native import VECTOR_LENGTH, kernel

FORWARD, MISSING = kernel("ssmzoo_dense_scan_forward")
BACKWARD, _ = kernel("ssmzoo_dense_scan_backward")
NORM, _ = kernel("ssmzoo_column_norm")
NORM_BACKWARD, _ = kernel("ssmzoo_column_norm_backward")


def _padded(T: Tensor) -> Tensor:
    """(s n n) with rows of whole vectors."""
    missing = -T.shape[-1] % VECTOR_LENGTH
    return (F.pad(T, (0, missing)) if missing else T).contiguous()


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


def forward(a: Symbols, save: bool):
    last, states = empty_results(a)
    if not _call(FORWARD, _padded(a.T.mT), a.codes, [a.x, a.h0, states if a.keep else None, last]):
        check_codes(a.codes, a.T.shape[0])
    return (last, states), None


def backward(a: Symbols, states: Tensor, d_last: Tensor, d_states: Tensor | None) -> dict[str, Tensor]:
    d_last, d_states = d_last.contiguous(), None if d_states is None else d_states.contiguous()
    rows = _padded(a.T)
    dx, d_h0, dT = torch.empty_like(states), torch.empty_like(a.h0), torch.empty_like(rows)
    _call(BACKWARD, rows, a.codes, [states, a.h0, d_states, d_last, dx, d_h0, dT])
    return {"T": dT[..., : a.T.shape[-1]].contiguous(), "x": dx, "h0": d_h0}


SYMBOLS.kernels["c"] = Kernel(forward, backward)


def _norm(function, a: Mixing, kept: Tensor, dT: Tensor | None) -> Tensor:
    """T, or the gradient of M."""
    M, slope = kept
    s, n, _ = M.shape
    to = torch.empty_like(M)
    pointers = [0 if t is None else t.data_ptr() for t in (M, dT, slope, to)]
    function(struct.pack("7qd", *pointers, s, n, torch.get_num_threads(), a.p_norm))
    return to


def mix_forward(a: Mixing, save: bool):
    kept = mixed(a)
    return (_norm(NORM, a, kept, None),), kept


def mix_backward(a: Mixing, kept: Tensor, dT: Tensor) -> dict[str, Tensor]:
    return unmixed(a, _norm(NORM_BACKWARD, a, kept, dT.contiguous()))


if MISSING is None:
    MIX.kernels["c"] = Kernel(mix_forward, mix_backward)


def why_not(a) -> str | None:
    if a.symbols is None:
        return "compiled for transitions given by symbols; mixtures that differ at every step run in PyTorch"
    if a.parallel:
        return "runs along time; parallel=True asks for products of transitions"
    return why_not_float(a.A_dict, a.weights, a.inputs, a.initial_state)


dense_scan.register("c", device="cpu", missing=MISSING, unsupported=why_not)(lambda a: scan(a, "c", False))
