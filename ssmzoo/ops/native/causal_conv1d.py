"""causal_conv1d_fn and causal_conv1d_update on our compiled CPU kernels (causal_conv1d.c)."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ssmzoo.ops.causal_conv1d import causal_conv1d_fn, causal_conv1d_update, last_inputs
from ssmzoo.ops.dispatch import no_double_backward
from ssmzoo.ops.native import VECTOR_LENGTH, kernel, pack, why_not_float

FORWARD, MISSING = kernel("ssmzoo_causal_conv1d_forward")
BACKWARD, _ = kernel("ssmzoo_causal_conv1d_backward")
UPDATE, _ = kernel("ssmzoo_causal_conv1d_update", [ctypes.c_void_p] * 5 + [ctypes.c_int64] * 5)
MAX_TILES = 16  # tiles of channels that a task keeps in cache at once

_LIBRARY = torch.library.Library("ssmzoo", "FRAGMENT")
_LIBRARY.define(
    "causal_conv1d(Tensor x, Tensor weight, Tensor? bias, Tensor? seq_idx, Tensor? initial_states, bool silu) -> Tensor"
)
_LIBRARY.define(
    "causal_conv1d_backward(Tensor dout, Tensor x, Tensor weight, Tensor? bias, Tensor? seq_idx, "
    "Tensor? initial_states, bool silu) -> (Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "causal_conv1d_update(Tensor x, Tensor(a!) conv_state, Tensor weight, Tensor? bias, bool silu) -> Tensor"
)


def _arguments(x, weight, bias, seq_idx, initial_states, silu, results):
    (b, c, l), k, threads = x.shape, weight.shape[1], torch.get_num_threads()
    if seq_idx is not None and seq_idx.dtype not in (torch.int32, torch.int64):
        seq_idx = seq_idx.long()
    tensors = [x, weight, bias, seq_idx, initial_states, *results]
    tiles = -(-c // VECTOR_LENGTH)
    per_task = min(MAX_TILES, max(1, -(-b * tiles // max(8, 4 * threads))))
    return tensors, pack(tensors, b, c, l, k, silu, per_task, threads)


def _forward(x, weight, bias, seq_idx, initial_states, silu):
    out = torch.empty_like(x)
    alive, arguments = _arguments(x, weight, bias, seq_idx, initial_states, silu, [out, *[None] * 5])
    FORWARD(arguments)
    return out


def _empty_gradients(x, weight, bias, initial_states):
    rest = (weight, bias, initial_states)
    return [torch.empty_like(x), *(x.new_empty(0) if t is None else t.new_empty(t.shape) for t in rest)]


def _backward(dout, x, weight, bias, seq_idx, initial_states, silu):
    grads = _empty_gradients(x, weight, bias, initial_states)
    dweight = x.new_empty(x.shape[0], *weight.shape, dtype=torch.float32)
    dbias = None if bias is None else x.new_empty(x.shape[0], x.shape[1], dtype=torch.float32)
    dinitial = None if initial_states is None else grads[3]
    alive, arguments = _arguments(
        x, weight, bias, seq_idx, initial_states, silu, [None, dout, grads[0], dinitial, dweight, dbias]
    )
    BACKWARD(arguments)
    grads[1] = dweight.sum(0).to(weight.dtype)
    if bias is not None:
        grads[2] = dbias.sum(0).to(bias.dtype)
    return tuple(grads)


def _update(x, conv_state, weight, bias, silu):
    y = torch.empty_like(x)
    shift = None if bias is None else bias.data_ptr()
    UPDATE(
        x.data_ptr(),
        conv_state.data_ptr(),
        weight.data_ptr(),
        shift,
        y.data_ptr(),
        *x.shape,
        conv_state.shape[2],
        weight.shape[1],
        silu,
    )
    return y


_LIBRARY.impl("causal_conv1d", _forward, "CPU")
_LIBRARY.impl("causal_conv1d_backward", _backward, "CPU")
_LIBRARY.impl("causal_conv1d_update", _update, "CPU")
torch.library.register_fake("ssmzoo::causal_conv1d", lambda x, *_: torch.empty_like(x), lib=_LIBRARY)
torch.library.register_fake("ssmzoo::causal_conv1d_update", lambda x, *_: torch.empty_like(x), lib=_LIBRARY)


@torch.library.register_fake("ssmzoo::causal_conv1d_backward", lib=_LIBRARY)
def _backward_fake(dout, x, weight, bias, seq_idx, initial_states, silu):
    return tuple(_empty_gradients(x, weight, bias, initial_states))


def _setup(ctx, inputs, output):
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx, dout):
    saved = ctx.saved_tensors  # read once: gradient checkpointing recomputes them for one reading only
    x, weight, bias, seq_idx, initial_states = saved
    dx, dw, db, di = torch.ops.ssmzoo.causal_conv1d_backward(dout, *saved, ctx.silu)
    return dx, dw, None if bias is None else db, None, None if initial_states is None else di, None


torch.library.register_autograd("ssmzoo::causal_conv1d", _gradients, setup_context=_setup, lib=_LIBRARY)
torch.library.register_autograd("ssmzoo::causal_conv1d_backward", no_double_backward("causal_conv1d"), lib=_LIBRARY)


def why_not(
    x,
    weight,
    bias=None,
    seq_idx=None,
    initial_states=None,
    return_final_states=False,
    final_states_out=None,
    activation=None,
) -> str | None:
    return why_not_float(x, weight, bias, initial_states)


@causal_conv1d_fn.register("native", device="cpu", missing=MISSING, unsupported=why_not)
def _causal_conv1d_native(
    x,
    weight,
    bias=None,
    seq_idx=None,
    initial_states=None,
    return_final_states=False,
    final_states_out=None,
    activation=None,
):
    out = torch.ops.ssmzoo.causal_conv1d(x, weight, bias, seq_idx, initial_states, activation is not None)
    if not return_final_states:
        return out
    states = last_inputs(x, seq_idx, initial_states, weight.shape[1] - 1)
    return out, states if final_states_out is None else final_states_out.copy_(states)


def why_not_update(x, conv_state, weight, bias=None, activation=None, cache_seqlens=None) -> str | None:
    if x.ndim != 2 or cache_seqlens is not None:
        return "takes one token without cache_seqlens"
    given = (x, conv_state, weight) if bias is None else (x, conv_state, weight, bias)
    for t in given:
        if t.dtype != torch.float32:
            return "takes float32 only"
        if not t.is_contiguous():
            return "takes contiguous tensors only"
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        return "has no backward; the torch backend does"
    return None


@causal_conv1d_update.register("native", device="cpu", missing=MISSING, unsupported=why_not_update)
def _causal_conv1d_update_native(x, conv_state, weight, bias=None, activation=None, cache_seqlens=None) -> Tensor:
    if type(x) is Tensor and type(conv_state) is Tensor and not torch.compiler.is_compiling():
        return _update(x, conv_state, weight, bias, activation is not None)  # 10 us less than through the dispatcher
    return torch.ops.ssmzoo.causal_conv1d_update(x, conv_state, weight, bias, activation is not None)
