"""Calls of the operators that benchmarks/gpu.py checks and times, at the size asked for."""

from __future__ import annotations

import torch

from ssmzoo import ops
from ssmzoo.ops.quantized_linear import pack_int4

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def scan_call(device, dtype, b, d, l, n=16, last=False, extras=False) -> dict:
    """Arguments of selective_scan_fn; `last`: channels next to each other in memory; `extras`: all optional ones."""

    def sequence():
        return torch.randn(b, l, d, device=device).transpose(1, 2) if last else torch.randn(b, d, l, device=device)

    call = dict(
        u=sequence(),
        delta=sequence() - 2,
        B=torch.randn(b, n, l, device=device),
        C=torch.randn(b, n, l, device=device),
        z=sequence(),
    )
    call = {name: t.to(dtype) for name, t in call.items()}
    call |= dict(
        A=-torch.rand(d, n, device=device) * n,
        D=torch.randn(d, device=device),
        delta_bias=torch.rand(d, device=device),
        delta_softplus=True,
    )
    if extras:
        call |= dict(initial_state=torch.randn(b, d, n, device=device), seq_idx=documents(device, b, l))
    return call


def conv_call(device, dtype, b, d, l, last=False, extras=False) -> dict:
    x = torch.randn(b, l, d, device=device).transpose(1, 2) if last else torch.randn(b, d, l, device=device)
    call = dict(
        x=x.to(dtype), weight=torch.randn(d, 4, device=device), bias=torch.randn(d, device=device), activation="silu"
    )
    return call | (dict(seq_idx=documents(device, b, l)) if extras else {})


def ssd_call(device, dtype, b, d, l, n=128, extras=False) -> dict:
    p = min(64, d)
    h = d // p
    call = dict(
        x=torch.randn(b, l, h, p, device=device),
        B=torch.randn(b, l, 1, n, device=device),
        C=torch.randn(b, l, 1, n, device=device),
    )
    call = {name: t.to(dtype) for name, t in call.items()}
    call |= dict(
        dt=torch.randn(b, l, h, device=device) - 2,
        A=-torch.rand(h, device=device) * 4,
        D=torch.randn(h, device=device),
        dt_softplus=True,
    )
    if extras:
        call |= dict(z=torch.randn(b, l, h, p, device=device).to(dtype), seq_idx=documents(device, b, l))
    return call


def documents(device, b, l) -> torch.Tensor:
    return (torch.rand(b, l, device=device) < 0.02).cumsum(1)


def rms_call(device, dtype, b, d, l, residual=False) -> dict:
    call = dict(x=torch.randn(b, l, d, device=device).to(dtype), weight=torch.randn(d, device=device).to(dtype))
    return call | (dict(residual=torch.randn(b, l, d, device=device)) if residual else {})


def layer_norm_call(device, dtype, b, d, l) -> dict:
    x, z = torch.randn(b, l, 2 * d, device=device).to(dtype).chunk(2, dim=-1)
    weight, bias = torch.randn(2, d, device=device).to(dtype)
    return dict(x=x, z=z, weight=weight, bias=bias)


def update_call(device, dtype, b, d, l, n=16) -> dict:
    """One token of b x l sequences."""
    rows = b * l
    call = dict(x=torch.randn(rows, d, device=device), z=torch.randn(rows, d, device=device))
    call |= dict(B=torch.randn(rows, n, device=device), C=torch.randn(rows, n, device=device))
    call = {k: t.to(dtype) for k, t in call.items()} | dict(dt=torch.randn(rows, d, device=device).to(dtype))
    state = torch.randn(rows, d, n, device=device)
    return dict(state=state, **call, A=-torch.rand(d, n, device=device), D=torch.randn(d, device=device))


def conv_update_call(device, dtype, b, d, l) -> dict:
    rows = b * l
    x, state = torch.randn(rows, d, device=device), torch.randn(rows, d, 4, device=device)
    return dict(x=x.to(dtype), conv_state=state.to(dtype), weight=torch.randn(d, 4, device=device), activation="silu")


def delta_call(device, dtype, b, d, l, channels=False, extras=False) -> dict:
    n = min(128, d)
    h = max(1, d // n)
    q, k, v = (torch.randn(b, l, h, n, device=device) for _ in range(3))
    q, k = torch.nn.functional.normalize(q, dim=-1) * n**-0.5, torch.nn.functional.normalize(k, dim=-1)
    g = -torch.rand(*(b, l, h), *[n] * channels, device=device)
    call = dict(q=q.to(dtype), k=k.to(dtype), v=v.to(dtype), g=g, beta=torch.rand(b, l, h, device=device))
    return call | (dict(seq_idx=documents(device, b, l)) if extras else {})


def taylor_call(device, dtype, b, d, l, f=16, extras=False) -> dict:
    p = min(64, d)
    call = {name: torch.randn(b, l, d // p, w, device=device).to(dtype) for name, w in (("q", f), ("k", f), ("v", p))}
    return call | (dict(seq_idx=documents(device, b, l)) if extras else {})


def trapezoidal_call(device, dtype, b, d, l, n=128, extras=False) -> dict:
    p = min(64, d)
    h = d // p
    k, q = (torch.randn(b, l, 1, h, n, device=device) * n**-0.5 for _ in range(2))  # rotated, in fp32
    a, gamma, beta = (torch.rand(b, l, h, device=device) for _ in range(3))
    call = dict(v=torch.randn(b, l, h, p, device=device).to(dtype), k=k, q=q, a=-a, gamma=gamma, beta=beta)
    call |= dict(D=torch.randn(h, device=device))
    return call | (dict(seq_idx=documents(device, b, l)) if extras else {})


def recurrence_call(device, dtype, b, d, l) -> dict:
    return {name: torch.rand(b, l, d, device=device).to(dtype) for name in ("a", "x")}


def complex_scan(a, b, initial_state) -> torch.Tensor:
    """ops.complex_scan of pairs (... 2) of real and imaginary parts."""
    return torch.view_as_real(ops.complex_scan(*map(torch.view_as_complex, (a, b, initial_state))))


def complex_call(device, dtype, b, d, l) -> dict:
    """In fp32 whatever the dtype: torch has no complex numbers of 16-bit ones."""
    a = torch.nn.functional.normalize(torch.randn(b, l, d, 2, device=device), dim=-1)
    return dict(a=a, b=torch.randn(b, l, d, 2, device=device), initial_state=torch.randn(b, d, 2, device=device))


def mamba3_step_call(device, dtype, b, d, l, n=128) -> dict:
    """One token of l sequences, at most 8."""
    rows, p = min(8, l), min(64, d)
    e, h, m = 2 * d, 2 * d // p, n // 4

    def new(*shape, scale=1.0, kind=dtype):
        return (scale * torch.randn(*shape, device=device)).to(kind)

    fp32 = torch.float32
    call = dict(u=new(rows, d), phase=new(rows, h, m, kind=fp32), ssm_state=new(rows, h, p, n, kind=fp32))
    call |= dict(last_k=new(rows, h, n), last_x=new(rows, h, p), D=new(h, kind=fp32), dt_bias=new(h, kind=fp32) - 2)
    call |= dict(in_proj=new(2 * e + 2 * n + 3 * h + m, d, scale=d**-0.5), out_proj=new(d, e, scale=e**-0.5))
    call |= {name: new(n) for name in ("B_norm", "C_norm")} | {name: new(h, n) for name in ("B_bias", "C_bias")}
    return call | dict(norm_weight=new(e))


def delta_step_call(device, dtype, b, d, l, k=4) -> dict:
    """One token of l sequences, at most 8."""
    rows, n = min(8, l), min(128, d)
    p, h = 2 * n, max(1, d // n)
    c, e = 2 * h * n + h * p, h * p

    def new(*shape, scale=1.0, kind=dtype):
        return (scale * torch.randn(*shape, device=device)).to(kind)

    call = dict(u=new(rows, d), conv_state=new(rows, c, k), state=new(rows, h, n, p, kind=torch.float32))
    call |= dict(in_proj=new(c + e + 2 * h, d, scale=d**-0.5), conv_weight=new(c, k), norm_weight=new(p))
    call |= dict(A_log=new(h, kind=torch.float32), dt_bias=new(h, kind=torch.float32))
    return call | dict(out_proj=new(d, e, scale=e**-0.5), num_heads=h)


def quantized_call(device, dtype, b, d, l, bits=4) -> dict:
    """l tokens, at most 16, by 4 d rows of integers in groups of 128."""
    codes = torch.randint(-8, 8, (4 * d, d), device=device)
    weight = pack_int4(codes) if bits == 4 else codes.to(torch.int8)
    call = dict(x=torch.randn(min(16, l), d, device=device).to(dtype), weight=weight, bits=bits, group_size=128)
    return call | dict(scale=torch.rand(4 * d, -(-d // 128), device=device) * d**-0.5)


def strings_call(device, dtype, b, d, l, n=64) -> dict:
    """Of b / 8 strings, as long as 8 of the others: few enough to be cut."""
    b, l = max(1, b // 8), 8 * l
    call = dict(A_dict=torch.randn(n, n, 3, device=device), weights=torch.rand(4, 3, device=device))
    call |= dict(inputs=torch.randn(4, n, device=device), symbols=torch.randint(4, (b, l), device=device))
    return call | dict(p_norm=1.2)


LAYERS = {  # what is checked with all its options
    "selective_scan": (ops.selective_scan_fn, scan_call, [{}, {"last": True}, {"extras": True}]),
    "causal_conv1d": (ops.causal_conv1d_fn, conv_call, [{}, {"last": True}, {"last": True, "extras": True}]),
    "ssd": (ops.mamba_chunk_scan_combined, ssd_call, [{}, {"extras": True}]),
    "rms_norm": (ops.rms_norm, rms_call, [{}]),
    "gated_layer_norm": (ops.gated_layer_norm, layer_norm_call, [{}]),
    "gated_delta_rule": (ops.gated_delta_rule, delta_call, [{"extras": True}, {"channels": True}]),
    "taylor_attention": (ops.taylor_attention, taylor_call, [{}, {"extras": True}]),
    "trapezoidal_scan": (ops.trapezoidal_scan, trapezoidal_call, [{}, {"extras": True}]),
    "gated_linear_recurrence": (ops.gated_linear_recurrence, recurrence_call, [{}]),
    "complex_scan": (complex_scan, complex_call, [{}]),
    "dense_scan": (ops.dense_scan, strings_call, [{}]),
    "mamba3_step": (ops.mamba3_step, mamba3_step_call, [{}]),
    "gated_delta_step": (ops.gated_delta_step, delta_step_call, [{}]),
    "quantized_linear": (ops.quantized_linear, quantized_call, [{}, {"bits": 8}]),
}
TIMED = {  # part: (operator, call, options, lengths, has a backward)
    "selective_scan": [(ops.selective_scan_fn, scan_call, {}, (2048, 4096, 8192, 16384), True)],
    "causal_conv1d": [(ops.causal_conv1d_fn, conv_call, {"last": True}, (2048, 8192), True)],
    "ssd": [(ops.mamba_chunk_scan_combined, ssd_call, {}, (2048, 8192), True)],
    "attention": [
        (ops.gated_delta_rule, delta_call, {}, (2048,), True),
        (ops.gated_delta_rule, delta_call, {"channels": True}, (2048,), True),
        (ops.taylor_attention, taylor_call, {}, (2048,), True),
    ],
    "recurrences": [
        (ops.trapezoidal_scan, trapezoidal_call, {}, (2048,), True),
        (ops.gated_linear_recurrence, recurrence_call, {}, (2048,), True),
        (complex_scan, complex_call, {}, (512,), True),
        (ops.dense_scan, strings_call, {}, (2048,), True),
    ],
    "norms": [
        (ops.rms_norm, rms_call, {}, (2048, 8192), True),
        (ops.rms_norm, rms_call, {"residual": True}, (2048,), True),
        (ops.gated_layer_norm, layer_norm_call, {}, (2048, 8192), True),
    ],
    "steps": [
        (ops.selective_state_update, update_call, {}, (1, 16, 64), False),
        (ops.causal_conv1d_update, conv_update_call, {}, (1, 16, 64), False),
    ],
    "layer steps": [
        (ops.mamba3_step, mamba3_step_call, {}, (1, 8), False),
        (ops.gated_delta_step, delta_step_call, {}, (1, 8), False),
        (ops.quantized_linear, quantized_call, {}, (1, 16), False),
        (ops.quantized_linear, quantized_call, {"bits": 8}, (1, 16), False),
    ],
}
