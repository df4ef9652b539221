"""A small call of every operator: what tests over all of them share."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ssmzoo import ops
from ssmzoo.ops.quantized_linear import pack_int4
from ssmzoo.ops.stack_step import MambaLayer
from ssmzoo.ops.token_step import Convolution, Instruction, MambaWeights, Program, Register, StateSpec


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def _positive(*shape: int) -> Tensor:
    return F.softplus(_normal(*shape))


def _scan():
    b, e, n, l = 2, 4, 3, 5
    return {
        "u": _normal(b, e, l),
        "delta": _normal(b, e, l),
        "A": -_positive(e, n),
        "B": _normal(b, 2, n, l),
        "C": _normal(b, n, l),
        "D": _normal(e),
        "z": _normal(b, e, l),
        "delta_bias": _normal(e),
        "initial_state": _normal(b, e, n),
    }


def _update():
    b, h, p, n = 2, 4, 3, 5
    return {
        "state": _normal(b, h, p, n),
        "x": _normal(b, h, p),
        "dt": _normal(b, h, p),
        "A": -_positive(h, p, n),
        "B": _normal(b, 2, n),
        "C": _normal(b, 2, n),
        "D": _normal(h, p),
        "z": _normal(b, h, p),
        "dt_bias": _normal(h, p),
    }


def _conv():
    return {"x": _normal(2, 3, 6), "weight": _normal(3, 4), "bias": _normal(3), "initial_states": _normal(2, 3, 3)}


def _conv_update():
    return {"x": _normal(2, 3, 2), "conv_state": _normal(2, 3, 4), "weight": _normal(3, 4), "bias": _normal(3)}


def _ssd():
    return {
        "X": _normal(2, 5, 4, 3),
        "a": -_positive(2, 5, 4),
        "B": _normal(2, 5, 2, 3),
        "C": _normal(2, 5, 2, 3),
        "initial_states": _normal(2, 4, 3, 3),
    }


def _combined():
    return {
        "x": _normal(2, 5, 4, 3),
        "dt": _normal(2, 5, 4),
        "A": -_positive(4),
        "B": _normal(2, 5, 2, 3),
        "C": _normal(2, 5, 2, 3),
        "D": _normal(4, 3),
        "z": _normal(2, 5, 4, 3),
        "dt_bias": _normal(4),
        "initial_states": _normal(2, 4, 3, 3),
    }


def _dense(symbols: bool):
    n, k, b, l = 3, 2, 2, 5
    rows = (4,) if symbols else (b, l)
    return {
        "A_dict": _normal(n, n, k),
        "weights": torch.softmax(_normal(*rows, k), -1),
        "inputs": _normal(*rows, n),
        "initial_state": _normal(b, n),
    }


def _cross():
    e, n, r = 2, 2, 1
    return {
        "x": _normal(1, e, 2, 3),
        "x_proj": _normal(4, r + 2 * n, e),
        "dt_proj": _normal(4, e, r),
        "dt_bias": _normal(4, e),
        "A": -_positive(4 * e, n),
        "D": _normal(4 * e),
    }


def _kernels(d: int):
    return {f"kernel{i}": _normal(d, 1, 3, 3) for i in range(3)} | {"alpha": _normal(3)}


def _spatial():
    b, h, w, e, r = 1, 2, 3, 2, 2
    return {
        "u": _normal(b, h, w, e),
        "steps": _normal(b, h, w, r + 2),
        "dt_proj": _normal(e, r),
        "dt_bias": _normal(e),
        "A": -_positive(e, 1),
        "D": _normal(e),
        **_kernels(e),
    }


def _recurrence():
    return {"a": torch.sigmoid(_normal(2, 5, 3)), "x": _normal(2, 5, 3), "initial_state": _normal(2, 3)}


def _step():
    b, d, e, n, r, k = 2, 3, 4, 3, 2, 4
    return {
        "u": _normal(b, d),
        "conv_state": _normal(b, e, k),
        "ssm_state": _normal(b, e, n),
        "conv_weight": _normal(e, k),
        "conv_bias": _normal(e),
        "x_proj": _normal(r + 2 * n, e),
        "dt_proj": _normal(e, r),
        "dt_bias": _normal(e),
        "A_log": _normal(e, n),
        "D": _normal(e),
        "in_proj": _normal(2 * e, d),
        "out_proj": _normal(d, e),
    }


def _step_of_heads():
    b, d, h, p, n, g, k = 2, 3, 4, 2, 3, 2, 4
    c = h * p + 2 * g * n
    return {
        "u": _normal(b, d),
        "conv_state": _normal(b, c, k),
        "ssm_state": _normal(b, h, p, n),
        "in_proj": _normal(h * p + c + h, d),
        "conv_weight": _normal(c, k),
        "conv_bias": _normal(c),
        "dt_bias": _normal(h),
        "A_log": _normal(h),
        "D": _normal(h),
        "norm_weight": _normal(h * p),
        "out_proj": _normal(d, h * p),
    }


def _step_of_mamba3():
    b, d, h, p, n, g, m = 2, 3, 4, 2, 5, 2, 2
    return {
        "u": _normal(b, d),
        "phase": _normal(b, h, m),
        "ssm_state": _normal(b, h, p, n),
        "last_k": _normal(b, h, n),
        "last_x": _normal(b, h, p),
        "in_proj": _normal(2 * h * p + 2 * g * n + 3 * h + m, d),
        "dt_bias": _normal(h),
        "B_norm": _normal(n),
        "C_norm": _normal(n),
        "B_bias": _normal(h, n),
        "C_bias": _normal(h, n),
        "D": _normal(h),
        "norm_weight": _normal(h * p),
        "out_proj": _normal(d, h * p),
    }


def _delta(per_channel: bool):
    b, l, h, n, p = 2, 5, 2, 3, 2
    return {
        "q": _normal(b, l, h, n),
        "k": F.normalize(_normal(b, l, h, n), dim=-1),
        "v": _normal(b, l, h, p),
        "g": -_positive(b, l, h, n) if per_channel else -_positive(b, l, h),
        "beta": 2 * torch.sigmoid(_normal(b, l, h)),
        "initial_state": _normal(b, h, n, p),
    }


def _step_of_delta(bottlenecks: bool):
    b, d, h, j, n, p, k = 2, 3, 4, 2, 3, 2, 4
    c = 2 * j * n + h * p
    more = {"f_proj": _normal(h * n, p), "g_proj": _normal(h * p, p), "g_bias": _normal(h * p)}
    return {
        "u": _normal(b, d),
        "conv_state": _normal(b, c, k),
        "state": _normal(b, h, n, p),
        "in_proj": _normal(c + (2 * p + h if bottlenecks else h * p + 2 * h), d),
        "conv_weight": _normal(c, k),
        "A_log": _normal(h),
        "dt_bias": _normal(h * n if bottlenecks else h),
        "norm_weight": _normal(p),
        "out_proj": _normal(d, h * p),
    } | (more if bottlenecks else {})


def _trapezoidal():
    b, l, r, h, p, n = 2, 4, 2, 2, 3, 2
    return {
        "v": _normal(b, l, h, p),
        "k": _normal(b, l, r, h, n),
        "q": _normal(b, l, r, h, n),
        "a": -_positive(b, l, h),
        "gamma": _normal(b, l, h),
        "beta": _normal(b, l, h),
        "D": _normal(h),
        "mimo": _normal(h, r, p),
        "initial_state": _normal(b, h, p, n),
    }


def _rotary():
    call = _trapezoidal()
    b, l, r, h, n = call["k"].shape
    turning = {"phase": _normal(b, l, h, n // 2), "k_bias": _normal(h, r, n), "q_bias": _normal(h, r, n)}
    return call | {"k": _normal(b, l, r, 1, n), "q": _normal(b, l, r, 1, n)} | turning


ENTRY = torch.tensor([[0, 2], [1, 1], [3, 0]])


def _taylor():
    b, l, h, f, p = 2, 5, 2, 2, 3
    return {"q": _normal(b, l, h, f), "k": _normal(b, l, h, f), "v": _normal(b, l, h, p)} | {
        "state": ops.taylor_state(_normal(b, 3, h, f), _normal(b, 3, h, p))
    }


def _complex_scan(a, b, initial_state):
    """Pairs (... 2) of real and imaginary parts in and out; torch makes no complex numbers of 16-bit ones."""
    pairs = (t.float() if t.dtype.itemsize == 2 else t for t in (a, b, initial_state))
    return torch.view_as_real(ops.OPERATORS["complex_scan"](*map(torch.view_as_complex, pairs)))


def _joined(name: str, **tensors):
    """state_fusion and spatial_scan take their three kernels as one argument."""
    kernels = tuple(tensors.pop(f"kernel{i}") for i in range(3))
    return getattr(ops, name)(**tensors, kernels=kernels)


def _in_place(name: str, state: str, /, **arguments):
    """An update as a function: the state given is left alone, the new one returned."""
    new = arguments.pop(state).clone()
    return getattr(ops, name)(**{state: new}, **arguments), new


def _stack(x, norm, first, second):
    """stack_step of two layers, whose other weights are fixed."""
    one = lambda *s: torch.linspace(-1, 2, math.prod(s), dtype=x.dtype, device=x.device).sin().view(s)  # noqa: E731
    layers = [
        MambaLayer(
            norm,
            1e-5,
            one(4, 1, 3),
            one(4),
            one(5, 4),
            one(4, 1),
            one(4),
            one(4, 2),
            one(4),
            first,
            None,
            one(3, 4),
            None,
        ),
        MambaLayer(
            norm,
            1e-5,
            one(4, 1, 3),
            None,
            one(5, 4),
            one(4, 1),
            one(4),
            one(4, 2),
            one(4),
            second,
            None,
            one(3, 4),
            None,
        ),
    ]
    y, states = ops.stack_step(x, layers, [(one(2, 4, 3), one(2, 4, 2)) for _ in layers])
    return y, *(t for state in states for t in state)


def _token(x, norm, first, second):
    """token_step of two layers x + Mamba(RMSNorm(x)), whose other weights are fixed."""
    one = lambda *shape: torch.linspace(-1, 2, math.prod(shape), dtype=x.dtype).sin().view(shape)  # noqa: E731
    small = (one(5, 4), one(4, 1), one(4), one(4, 2), one(4))
    weights = [
        MambaWeights(Convolution(one(4, 1, 3), bias), *small, m, None, one(3, 4), None)
        for m, bias in ((first, one(4)), (second, None))
    ]

    def layers(x, states):
        new = []
        for w, state in zip(weights, states):
            y, *after = ops.mamba_step(ops.rms_norm(x, norm, 1e-5), *state, w.conv.weight[:, 0], w.conv.bias, *w[1:-1])
            x = x + y
            new.append(tuple(after))
        return x, tuple(new), {}

    stream, u = Register(0, 0, 3, 3), Register(3, 0, 3, 3)
    code, specs = [], []
    for i, w in enumerate(weights):
        code.append(Instruction("norm", u, stream, weights=(norm,), numbers=(0, 3, 0), factors=(1e-5,)))
        code.append(Instruction("mamba", stream, u, numbers=(0, 1), states=(2 * i, 2 * i + 1), layer=w))
        specs += [StateSpec((4, 3)), StateSpec((4, 2))]
    before = tuple((one(2, 4, 3), one(2, 4, 2)) for _ in weights)
    y, states, _ = ops.token_step(x, Program(code, specs, 6, layers), before)
    return y, *(t for state in states for t in state)


SEQ_IDX = torch.tensor([[0, 0, 1, 1, 1], [3, 3, 3, 3, 4]])
SYMBOLS = torch.tensor([[0, 3, 1, 1, 2], [2, 0, 0, 3, 1]])
PADDED = torch.tensor([[-1, 0, 0, 1, 1, 1], [2, 2, 2, 5, -1, -1]])


def _example(function, make, **options):
    """() -> (function of the named tensors, the tensors, the function that makes them)."""
    return lambda: (functools.partial(function, **options), make)


EXAMPLES = {
    "selective_scan_fn": _example(
        ops.selective_scan_fn, _scan, delta_softplus=True, return_last_state=True, seq_idx=SEQ_IDX
    ),
    "selective_state_update": _example(
        functools.partial(_in_place, "selective_state_update", "state"), _update, dt_softplus=True
    ),
    "causal_conv1d_fn": _example(ops.causal_conv1d_fn, _conv, activation="silu", return_final_states=True),
    "causal_conv1d_fn: packed, padded": _example(
        ops.causal_conv1d_fn, _conv, activation="silu", return_final_states=True, seq_idx=PADDED
    ),
    "causal_conv1d_update": _example(
        functools.partial(_in_place, "causal_conv1d_update", "conv_state"), _conv_update, activation="silu"
    ),
    "causal_conv1d_update: circular": _example(
        functools.partial(_in_place, "causal_conv1d_update", "conv_state"),
        _conv_update,
        cache_seqlens=torch.tensor([1, 3]),
    ),
    "ssd_scan": _example(ops.ssd_scan, _ssd, seq_idx=SEQ_IDX, chunk_size=2),
    "mamba_chunk_scan_combined": _example(
        ops.mamba_chunk_scan_combined,
        _combined,
        chunk_size=2,
        dt_softplus=True,
        dt_limit=(0.1, 1.5),
        return_final_states=True,
        seq_idx=SEQ_IDX,
    ),
    "dense_scan": _example(ops.dense_scan, functools.partial(_dense, False), p_norm=1.2, seq_idx=SEQ_IDX),
    "dense_scan: symbols": _example(ops.dense_scan, functools.partial(_dense, True), p_norm=1.2, symbols=SYMBOLS),
    "cross_scan": _example(ops.cross_scan, lambda: {"x": _normal(1, 2, 2, 3)}),
    "cross_merge": _example(ops.cross_merge, lambda: {"y": _normal(1, 4, 2, 2, 3)}),
    "cross_selective_scan": _example(ops.cross_selective_scan, _cross),
    "state_fusion": _example(
        functools.partial(_joined, "state_fusion"), lambda: {"x": _normal(1, 2, 3, 4), **_kernels(2)}
    ),
    "spatial_scan": _example(functools.partial(_joined, "spatial_scan"), _spatial),
    "depthwise_conv2d": _example(
        ops.depthwise_conv2d,
        lambda: {"x": _normal(1, 3, 3, 2), "weight": _normal(2, 1, 3, 3), "bias": _normal(2)},
        act="silu",
        rectify=True,
    ),
    "linear_act": _example(
        ops.linear_act, lambda: {"x": _normal(2, 3), "weight": _normal(4, 3), "bias": _normal(4)}, act="gelu"
    ),
    "quantized_linear": _example(
        ops.quantized_linear,
        lambda: {"x": _normal(2, 6), "scale": _positive(4, 2), "bias": _normal(4)},
        weight=pack_int4(torch.arange(-8, 4).repeat(2).view(4, 6)),
        bits=4,
        group_size=4,
    ),
    "gated_layer_norm": _example(
        ops.gated_layer_norm,
        lambda: {"x": _normal(2, 3), "z": _normal(2, 3), "weight": _normal(3), "bias": _normal(3)},
    ),
    "gated_linear_recurrence": _example(ops.gated_linear_recurrence, _recurrence),
    "gated_linear_recurrence: reverse": _example(ops.gated_linear_recurrence, _recurrence, reverse=True),
    "rms_norm": _example(ops.rms_norm, lambda: {"x": _normal(2, 3), "weight": _normal(3)}),
    "gated_delta_rule": _example(ops.gated_delta_rule, functools.partial(_delta, False), seq_idx=SEQ_IDX, chunk_size=2),
    "gated_delta_rule: a decay per channel": _example(
        ops.gated_delta_rule, functools.partial(_delta, True), seq_idx=SEQ_IDX, chunk_size=2
    ),
    "gated_delta_step": _example(
        ops.gated_delta_step, functools.partial(_step_of_delta, False), num_heads=2, beta_scale=2.0
    ),
    "gated_delta_step: bottlenecks": _example(
        ops.gated_delta_step, functools.partial(_step_of_delta, True), num_heads=2
    ),
    "mamba_step": _example(ops.mamba_step, _step),
    "stack_step": _example(
        _stack,
        lambda: {"x": _normal(2, 3), "norm": _normal(3), "first": _normal(8, 3), "second": _normal(8, 3)},
    ),
    "token_step": _example(
        _token,
        lambda: {"x": _normal(2, 3), "norm": _normal(3), "first": _normal(8, 3), "second": _normal(8, 3)},
    ),
    "mamba2_step": _example(ops.mamba2_step, _step_of_heads, ngroups=2),
    "mamba3_step": _example(ops.mamba3_step, _step_of_mamba3, ngroups=2),
    "complex_scan": _example(
        _complex_scan,
        lambda: {"a": 0.4 * _normal(2, 5, 3, 2), "b": _normal(2, 5, 3, 2), "initial_state": _normal(2, 3, 2)},
    ),
    "dot_rows": _example(ops.OPERATORS["dot_rows"], lambda: {"table": _normal(4, 3), "x": _normal(3, 3)}, entry=ENTRY),
    "sum_rows": _example(
        ops.OPERATORS["sum_rows"], lambda: {"table": _normal(4, 3), "weight": _normal(3, 2)}, entry=ENTRY
    ),
    "rotary_trapezoidal_scan": _example(
        ops.OPERATORS["rotary_trapezoidal_scan"], _rotary, seq_idx=SEQ_IDX[:, :4], chunk_size=2
    ),
    "trapezoidal_scan": _example(ops.OPERATORS["trapezoidal_scan"], _trapezoidal, seq_idx=SEQ_IDX[:, :4], chunk_size=2),
    "taylor_attention": _example(
        ops.taylor_attention,
        _taylor,
        seq_idx=SEQ_IDX,
        mask=torch.tensor([[True, False, True, True, True], [True, True, True, True, False]]),
    ),
    "permute_tokens": _example(
        ops.OPERATORS["permute_tokens"],
        lambda: {"x": _normal(2, 3, 2)},
        order=torch.tensor([[2, 0, 1], [0, 2, 1]]),
        inverse=True,
    ),
    "bidirectional_scan": _example(ops.OPERATORS["bidirectional_scan"], lambda: {"x": _normal(2, 2, 3)}),
    "prepend_mean": _example(ops.OPERATORS["prepend_mean"], lambda: {"x": _normal(2, 3, 2)}),
    "mix_tokens": _example(ops.OPERATORS["mix_tokens"], lambda: {"x": _normal(2, 3, 4), "weights": _normal(2, 2, 4)}),
    "router_logits": _example(ops.OPERATORS["router_logits"], lambda: {"x": _normal(2, 3), "gate": _normal(3, 2)}),
}


def in_order(function, make):
    """The example with its tensors given in order: (function, tensors, function that makes others)."""
    names = list(make())

    def call(*tensors):
        return function(**dict(zip(names, tensors)))

    def again():
        return tuple(make().values())

    return call, again(), again
