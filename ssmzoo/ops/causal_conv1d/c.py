"""causal_conv1d_fn and causal_conv1d_update on our compiled CPU kernels (causal_conv1d.c)."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ssmzoo.ops.causal_conv1d import causal_conv1d_update, empty_gradients, register
from ssmzoo.ops.checks import why_not_float
from ssmzoo.ops.eager import eager, needs_grad
from ssmzoo.ops.library import Kernel, in_place
from ssmzoo.ops.native import VECTOR_LENGTH, kernel, pack
from ssmzoo.ops.rows import checked

FORWARD, MISSING = kernel("ssmzoo_causal_conv1d_forward")
BACKWARD, _ = kernel("ssmzoo_causal_conv1d_backward")
UPDATE, MISSING_UPDATE = kernel("ssmzoo_causal_conv1d_step", [ctypes.c_void_p] * 7 + [ctypes.c_int64] * 6)
MAX_TILES = 16  # tiles of channels that a task keeps in cache at once


def _arguments(a, results):
    (b, c, l), k, threads = a.x.shape, a.weight.shape[1], torch.get_num_threads()
    seq_idx = a.seq_idx
    if seq_idx is not None and seq_idx.dtype not in (torch.int32, torch.int64):
        seq_idx = seq_idx.long()
    tensors = [a.x, a.weight, a.bias, seq_idx, a.initial_states, *results]
    tiles = -(-c // VECTOR_LENGTH)
    per_task = min(MAX_TILES, max(1, -(-b * tiles // max(8, 4 * threads))))
    return tensors, pack(tensors, b, c, l, k, a.activation is not None, per_task, threads)


def forward(a, save):
    out = torch.empty_like(a.x)
    alive, arguments = _arguments(a, [out, *[None] * 5])
    FORWARD(arguments)
    return (out,), None


def backward(a, saved, dout):
    grads, b = empty_gradients(a), a.x.shape[0]
    dweight = a.x.new_empty(b, *a.weight.shape, dtype=torch.float32)
    dbias = None if a.bias is None else a.x.new_empty(b, *a.bias.shape, dtype=torch.float32)
    alive, arguments = _arguments(a, [None, dout, grads["x"], grads.get("initial_states"), dweight, dbias])
    BACKWARD(arguments)
    grads["weight"] = dweight.sum(0).to(a.weight.dtype)
    if a.bias is not None:
        grads["bias"] = dbias.sum(0).to(a.bias.dtype)
    return grads


def why_not(a) -> str | None:
    return why_not_float(a.x, a.weight, a.bias, a.initial_states)


register("c", Kernel(forward, backward), device="cpu", missing=MISSING, unsupported=why_not)


def _update(a) -> Tensor:
    x, rows, seen = a.x.contiguous(), a.conv_state_indices, a.cache_seqlens
    rows = None if rows is None else checked(rows, a.conv_state).long().contiguous()
    seen = None if seen is None else seen.long().contiguous()
    y = torch.empty_like(x)
    UPDATE(
        x.data_ptr(),
        a.conv_state.data_ptr(),
        a.weight.data_ptr(),
        None if a.bias is None else a.bias.data_ptr(),
        y.data_ptr(),
        None if rows is None else rows.data_ptr(),
        None if seen is None else seen.data_ptr(),
        x.shape[0],
        x.shape[1],
        x.shape[2] if x.ndim == 3 else 1,
        a.conv_state.shape[2],
        a.weight.shape[1],
        a.activation is not None,
    )
    return y if x is a.x or a.x.is_contiguous() else torch.empty_like(a.x).copy_(y)  # strides as tracers expect them


TRACED_UPDATE = in_place("causal_conv1d_update", causal_conv1d_update.Arguments, "conv_state", _update, like="x")


def why_not_update(a) -> str | None:
    for t in (a.x, a.conv_state, a.weight, a.bias):
        if t is not None and t.dtype != torch.float32:
            return "takes float32 only"
    for t in (a.conv_state, a.weight, a.bias):
        if t is not None and not t.is_contiguous():
            return "takes contiguous tensors only"
    grad = needs_grad(a.x, a.conv_state, a.weight, a.bias)
    return "has no backward; the torch backend does" if grad else None


@causal_conv1d_update.register("c", device="cpu", missing=MISSING_UPDATE, unsupported=why_not_update)
def causal_conv1d_update_c(a) -> Tensor:
    return _update(a) if eager(a.x, a.conv_state) else TRACED_UPDATE(*a)
