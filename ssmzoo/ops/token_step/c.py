"""token_step on our compiled CPU kernels (token_step.c and the files beside it): one call for all layers."""

from __future__ import annotations

import ctypes
import struct

import torch
from torch import Tensor

from ssmzoo.ops import in_place
from ssmzoo.ops.eager import why_not_eager
from ssmzoo.ops.mamba_step.c import MAX_ROWS
from ssmzoo.ops.native import kernel
from ssmzoo.ops.native.multiply import packed
from ssmzoo.ops.stack_step import Integers
from ssmzoo.ops.token_step import (
    KINDS,
    ExpertWeights,
    Instruction,
    MambaWeights,
    Matrix,
    Program,
    flat,
    layout,
    rebuilt,
    token_step,
)

STEP, MISSING = kernel("ssmzoo_token_step")
ARGUMENTS = struct.Struct("14q")
LAYER = struct.Struct("62q3d")
INSTRUCTION = struct.Struct("50q4d5q")
MATRIX = struct.Struct("11q")
METRICS = 5  # behind the shares of the experts
NO_MATRIX = (0,) * 11


def why_not(a) -> str | None:
    if torch.is_grad_enabled():
        return "serves decoding: without gradients"
    b = a.x.shape[0]
    if b > MAX_ROWS:
        return f"serves up to {MAX_ROWS} sequences, got {b}"
    program, states = a.program, []
    try:
        flat(a.states, states)
    except TypeError:
        return "takes states of tensors alone"
    if len(states) != len(program.states):
        return f"the program has {len(program.states)} states, got {len(states)}"
    for (wanted, dtype, like, _), t in zip(program.states, states):
        shape = t.shape
        rest, first = (shape[1:], True) if like is None else (shape[2:], shape[1] == states[like].shape[1])
        if rest != wanted or not first or shape[0] != b or t.dtype is not dtype or not t.is_cpu:
            return f"computes with states (b ...) of {wanted} and {dtype}, got {tuple(shape)} of {t.dtype}"
    if program.layout is None:
        program.layout = layout(a.states)
    a.program.given = a.states, states
    if a.program.packed is None:
        a.program.packed = pack_program(a.program)
    return a.program.packed[0] or why_not_eager(a.x)


def _parts(value):
    """The tensors and `Integers` that an instruction holds, in tuples of any depth."""
    if isinstance(value, Tensor | Integers):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from _parts(part)


def _tensors(i: Instruction):
    """Those that the kernel reads as floats."""
    for value in _parts((i.matrix, i.weights, i.layer)):
        if isinstance(value, Integers):
            yield from (t for t in (value.scale, value.act_scale, value.rounded) if t is not None)
        elif value.dtype is not torch.int8:
            yield value


def objection(program: Program) -> str | None:
    for i in program.code:
        for t in _tensors(i):
            if not t.is_contiguous():
                return f"computes with contiguous tensors, got strides {t.stride()}"
            if (why := why_not_eager(t)) is not None:
                return why
        for m in _parts((i.matrix, i.layer)):
            if isinstance(m, Integers) and m.bits == 4 and m.group_size % 2 and m.scale.shape[1] > 1:
                return f"reads 4-bit weights in pairs of one group; group_size = {m.group_size} is odd"
    return None


def _matrix(w: Matrix, bias: Tensor | None) -> tuple[int, ...]:
    return packed(w, bias) if isinstance(w, Tensor) else packed(w.weight, bias, w.scale, None, *w[2:])


def pack_experts(layer: ExpertWeights) -> bytes:
    count = len(layer.lin1)
    packed_ = [[_matrix(w, b) for w, b in part] or [NO_MATRIX] * count for part in layer]
    return b"".join(MATRIX.pack(*m) for part in packed_ for m in part)


def pack_layer(layer) -> bytes:
    if type(layer) is ExpertWeights:
        return pack_experts(layer)
    mixer = _matrix(layer.in_proj, layer.in_bias) + _matrix(layer.out_proj, layer.out_bias)
    if type(layer) is MambaWeights:
        mixer += _matrix(layer.x_proj, None) + _matrix(layer.dt_proj, layer.dt_bias)
        e, n = layer.A_log.shape
        tensors, sizes, numbers = (None, None), (e, 0, 0, n, 0, layer.conv.weight.shape[-1], 0), (0.0, 0.0, 0.0)
    else:
        mixer += NO_MATRIX + NO_MATRIX
        h, p, n = layer.heads
        tensors = layer.dt_bias, layer.norm_weight
        sizes = h * p, h, p, n, layer.ngroups, layer.conv.weight.shape[-1], layer.D.numel() != h
        numbers = layer.gate_eps, layer.dt_min, layer.dt_max
    tensors = *layer.conv, layer.A_log, layer.D, *tensors, layer.special
    sizes = 0 if layer.special is None else len(layer.special), *sizes
    return LAYER.pack(*mixer, *(0 if t is None else t.data_ptr() for t in tensors), *sizes, *numbers)


def _filled(values, size: int) -> tuple:
    if len(values) > size:
        raise ValueError(f"an instruction has {len(values)} operands where {size} fit")
    return (*values, *(0,) * (size - len(values)))


def pack_program(program: Program) -> tuple:
    """(why the kernel cannot run it or None, instructions, layers); the instructions point at the layers."""
    why = objection(program)
    if why is not None:
        return why, None, None
    layers = [None if i.layer is None else ctypes.create_string_buffer(pack_layer(i.layer)) for i in program.code]
    code = []
    for i, layer in zip(program.code, layers):
        registers = (n for r in (i.out, i.a, i.b, i.c, i.d) for n in r)
        matrix = NO_MATRIX if i.matrix is None else _matrix(*i.matrix)
        weights = _filled([0 if w is None else w.data_ptr() for w in i.weights], 8)
        numbers, factors = _filled([int(n) for n in i.numbers], 10), _filled(i.factors, 4)
        states, at = _filled(i.states, 4), 0 if layer is None else ctypes.addressof(layer)
        head = KINDS.index(i.kind), *registers, *matrix, *weights, *numbers
        code.append(INSTRUCTION.pack(*head, *map(float, factors), *states, at))
    return None, ctypes.create_string_buffer(b"".join(code)), layers


def aux_of(metrics: Tensor, experts: tuple[int, int, bool, bool]) -> dict[str, Tensor]:
    layers, count, balance, z = experts
    shares, rest = metrics.split([layers * count, METRICS])
    busiest, dropped, entropy, balance_loss, z_loss = rest.unbind()
    aux = {"load_balancing_loss": balance_loss} if balance else {}
    aux |= {"z_loss": z_loss} if z else {}
    aux |= {"tokens_per_expert": shares.view(layers, count), "busiest_expert": busiest}
    return aux | {"dropped_fraction": dropped, "router_entropy": entropy}


@token_step.register("c", device="cpu", missing=MISSING, unsupported=why_not)
def token_step_c(a) -> tuple[Tensor, tuple, dict[str, Tensor]]:
    program, x = a.program, a.x.contiguous()
    b, d = x.shape
    out, new, slots = torch.empty_like(x), [], []
    whose, before = program.given
    if whose is not a.states:
        before = flat(a.states, [])
    before, program.given = [t if t.is_contiguous() else t.contiguous() for t in before], (None, None)
    for spec, t in zip(program.states, before):
        if spec.like is None:
            after, length, kept = in_place.next_state(t), 0, 0
        else:
            length = t.shape[1]
            kept = min(length + 1, spec.most) if spec.most else length + 1
            after = t.new_empty(b, kept, *spec.shape)
        new.append(after)
        slots += (t.data_ptr(), after.data_ptr(), length, kept, length, kept)
    metrics = None
    if program.experts is not None:
        metrics = torch.zeros(program.experts[0] * program.experts[1] + METRICS)
    states = struct.pack(f"{len(slots)}q", *slots)
    states_at = ctypes.cast(ctypes.c_char_p(states), ctypes.c_void_p).value
    at = 0 if metrics is None else metrics.data_ptr()
    sizes = b, d, len(program.code), program.floats, torch.get_num_threads()
    code_at = ctypes.addressof(program.packed[1])
    STEP(ARGUMENTS.pack(code_at, states_at, x.data_ptr(), out.data_ptr(), at, *sizes, 0, 0, 0, 0))
    return out, rebuilt(new, program.layout), {} if metrics is None else aux_of(metrics, program.experts)
