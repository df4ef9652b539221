"""gated_delta_step on our GPU kernels: three launches for the token of a layer, two more with bottlenecks.

project   [qkv, gate, beta, decay] = W_in u, the convolution of qkv and its state (mamba_step/triton_kernels.py)
project   decay <- W_f decay, gate <- W_g gate + b, where there are bottlenecks
advance   lengths, decays, the delta rule and its state, norm and gate (triton_kernels.py)
project   out = W_out y
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from ssmzoo.ops.gated_delta_step import LENGTH_EPS, gated_delta_step
from ssmzoo.ops.in_place import next_state
from ssmzoo.ops.mamba_step.triton import project, why_not
from ssmzoo.ops.triton import DEVICE, MISSING, on_device_of, power_of_2
from ssmzoo.ops.triton.variants import DTYPES, Passes, Variant, meta

PASSES = {"project": Passes(("E", "W"), most=100), "advance": Passes(("N", "P"), (1,), most=100)}

STATES = 4096  # numbers of the state that a program has at once, at most
TENSORS = 12  # of the arguments; numbers follow


def advance_layer(a) -> tuple[Tensor, Tensor, Tensor]:
    from ssmzoo.ops.gated_delta_step import triton_kernels as kernels

    (b, h, n, p), c, narrow = a.state.shape, a.conv_state.shape[1], a.f_proj is not None
    new = functools.partial(a.u.new_empty, dtype=torch.float32)
    conv, state = next_state(a.conv_state, a.in_proj.dtype), next_state(a.state, torch.float32)
    convolution = (0, a.conv_state, a.conv_weight, None, conv)
    projected = project(a.u, a.in_proj, None, new(b, a.in_proj.shape[0]), conv=convolution)
    gate, beta, decay = projected[:, c:].split([p, h, p] if narrow else [h * p, h, h], dim=1)
    if narrow:
        decay, gate = project(decay, a.f_proj, None, new(b, h * n)), project(gate, a.g_proj, a.g_bias, new(b, h * p))
    y, N = new(b, h * p), power_of_2(n)
    kernels.advance[h, b](
        projected,
        gate,
        beta,
        decay,
        a.A_log,
        a.dt_bias,
        a.norm_weight,
        a.state,
        state,
        y,
        *(t.stride(0) for t in (projected, gate, beta, decay)),
        h,
        h // a.num_heads,
        n,
        p,
        n**-0.5,
        a.beta_scale,
        LENGTH_EPS,
        a.eps,
        PER_CHANNEL=narrow,
        P=min(power_of_2(p), max(1, STATES // N)),
        ALL=power_of_2(p),
        N=N,
        num_warps=4,
    )
    return project(y, a.out_proj, None, a.u.new_empty(b, a.out_proj.shape[0])), conv, state


@gated_delta_step.register(
    "triton", device=DEVICE, missing=MISSING, unsupported=functools.partial(why_not, count=TENSORS)
)
def gated_delta_step_triton(a) -> tuple[Tensor, Tensor, Tensor]:
    with on_device_of(a.u):
        return advance_layer(a)


def variants() -> Iterator[Variant]:
    def call(kind, b=1, d=768, h=6, j=6, n=128, p=256, k=4, narrow=False):
        new = functools.partial(meta, dtype=kind)
        c, e = 2 * j * n + h * p, h * p
        rows = c + 2 * p + h if narrow else c + e + 2 * h
        given = new(b, d), new(b, c, k), meta(b, h, n, p), new(rows, d), new(c, k), meta(h)
        more = (new(h * n, p), new(e, p), new(e)) if narrow else (None, None, None)
        dt_bias = meta(h * n) if narrow else meta(h)
        a = gated_delta_step.Arguments(*given, dt_bias, new(p), new(d, e), *more, num_heads=j)
        return functools.partial(advance_layer, a)

    for dtype, kind in DTYPES.items():
        yield Variant(f"{dtype}, d 768, h 6", call(kind), typical=dtype == "bf16")
        yield Variant(f"{dtype}, bottlenecks, h 6, p 128", call(kind, p=128, narrow=True))
    yield Variant("bf16, n 5, p 20", call(torch.bfloat16, 2, 40, 4, 2, 5, 20))
