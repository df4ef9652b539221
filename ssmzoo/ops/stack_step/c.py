"""stack_step on our compiled CPU kernel (stack_step.c): one call for all layers."""

from __future__ import annotations

import ctypes
import struct

import torch
from torch import Tensor

from ssmzoo.ops.eager import why_not_eager
from ssmzoo.ops.mamba_step.c import MAX_ROWS
from ssmzoo.ops.native import kernel
from ssmzoo.ops.native.multiply import packed
from ssmzoo.ops.stack_step import Integers, MambaLayer, stack_step

STEP, MISSING = kernel("ssmzoo_stack_step")
LAYER = struct.Struct("2qd45q3d")
NO_MATRIX = (0,) * 8


def why_not(a) -> str | None:
    if torch.is_grad_enabled():
        return "serves decoding: without gradients"
    if a.x.shape[0] > MAX_ROWS:
        return f"serves up to {MAX_ROWS} sequences, got {a.x.shape[0]}"
    floats, codes = [a.x], []
    for layer, state in zip(a.layers, a.states):
        for t in (*layer, *state):
            if isinstance(t, Tensor):
                floats.append(t)
            elif isinstance(t, Integers):
                if t.bits == 4 and t.group_size % 2 and t.scale.shape[1] > 1:
                    return f"reads 4-bit weights in pairs of one group; group_size = {t.group_size} is odd"
                floats.append(t.scale)
                codes.append(t.weight)
    for t in (*floats[1:], *codes):
        if not t.is_contiguous():
            return f"computes with contiguous tensors, got strides {t.stride()}"
    return why_not_eager(*floats)


def _matrix(w: Tensor | Integers, bias: Tensor | None) -> tuple[int, ...]:
    return packed(w, bias) if isinstance(w, Tensor) else packed(w.weight, bias, w.scale, None, w.bits, w.group_size)


def pack_layer(layer, ssm_state: Tensor) -> bytes:
    one, two = (layer, None) if type(layer) is MambaLayer else (None, layer)
    mixer = _matrix(layer.in_proj, layer.in_bias) + _matrix(layer.out_proj, layer.out_bias)
    if one is not None:
        mixer += _matrix(one.x_proj, None) + _matrix(one.dt_proj, one.dt_bias)
        e, n = one.A_log.shape
        tensors, sizes = (None, None), (e, 0, 0, n, 0, layer.conv_weight.shape[-1], 0)
        numbers = 0.0, 0.0, 0.0
    else:
        mixer += NO_MATRIX + NO_MATRIX
        _, h, p, n = ssm_state.shape
        tensors = two.dt_bias, two.norm_weight
        sizes = h * p, h, p, n, two.ngroups, layer.conv_weight.shape[-1], two.D.numel() != h
        numbers = two.gate_eps, two.dt_min, two.dt_max
    tensors = layer.conv_weight, layer.conv_bias, layer.A_log, layer.D, *tensors
    pointers = (0 if t is None else t.data_ptr() for t in tensors)
    return LAYER.pack(two is not None, layer.norm.data_ptr(), layer.eps, *mixer, *pointers, *sizes, *numbers)


@stack_step.register("c", device="cpu", missing=MISSING, unsupported=why_not)
def stack_step_c(a) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    x = a.x.contiguous()
    out, new = torch.empty_like(x), [(torch.empty_like(c), torch.empty_like(s)) for c, s in a.states]
    layers = b"".join([pack_layer(layer, s) for layer, (_, s) in zip(a.layers, a.states)])
    pointers = [t.data_ptr() for before, after in zip(a.states, new) for t in (*before, *after)]
    states = struct.pack(f"{len(pointers)}q", *pointers)
    run(layers, states, x, out, len(new))
    return out, new


def run(layers: bytes, states: bytes, x: Tensor, out: Tensor, count: int) -> None:
    address = ctypes.c_char_p
    layers_at, states_at = (ctypes.cast(address(b), ctypes.c_void_p).value for b in (layers, states))
    b, d = x.shape
    STEP(struct.pack("8q", layers_at, states_at, x.data_ptr(), out.data_ptr(), b, d, count, torch.get_num_threads()))
