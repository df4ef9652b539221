"""mamba3_step on our GPU kernels: three launches for the token of a layer.

project   [z, x, B, C, d, a, t, g] = W_in u (mamba_step/triton_kernels.py)
advance   steps, phases, keys and queries, the recurrence and its states, norm and gate (triton_kernels.py)
project   out = W_out y
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from ssmzoo.ops.in_place import next_state
from ssmzoo.ops.mamba3_step import mamba3_step
from ssmzoo.ops.mamba_step.triton import project, why_not
from ssmzoo.ops.triton import DEVICE, MISSING, on_device_of, power_of_2
from ssmzoo.ops.triton.variants import DTYPES, Passes, Variant, meta

PASSES = {"project": Passes(("E", "W"), most=100), "advance": Passes(("P", "N"), (1,), most=100)}

STATES = 4096  # numbers of the state that a program has at once, at most
TENSORS = 14  # of the arguments; numbers follow


def advance_layer(a) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from ssmzoo.ops.mamba3_step import triton_kernels as kernels

    (b, h, p, n), m = a.ssm_state.shape, a.phase.shape[2]
    new = functools.partial(a.u.new_empty, dtype=torch.float32)
    states = [next_state(t) for t in (a.phase, a.ssm_state, a.last_k, a.last_x)]
    projected = project(a.u, a.in_proj, None, new(b, a.in_proj.shape[0]))
    y, N = new(b, h * p), power_of_2(n)
    kernels.advance[h, b](
        projected,
        a.dt_bias,
        a.B_norm,
        a.C_norm,
        a.B_bias,
        a.C_bias,
        a.D,
        a.norm_weight,
        a.phase,
        a.ssm_state,
        a.last_k,
        a.last_x,
        *states,
        y,
        h,
        p,
        n,
        a.ngroups,
        m,
        a.A_floor,
        a.B_eps,
        a.C_eps,
        a.eps,
        P=min(power_of_2(p), max(1, STATES // N)),
        ALL=power_of_2(p),
        N=N,
        num_warps=4,
    )
    return project(y, a.out_proj, None, a.u.new_empty(b, a.out_proj.shape[0])), *states


@mamba3_step.register("triton", device=DEVICE, missing=MISSING, unsupported=functools.partial(why_not, count=TENSORS))
def mamba3_step_triton(a) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    with on_device_of(a.u):
        return advance_layer(a)


def variants() -> Iterator[Variant]:
    def call(kind, b=1, d=768, h=24, p=64, n=128, m=32, norm=False):
        new, e = functools.partial(meta, dtype=kind), h * p
        states = meta(b, h, m), meta(b, h, p, n), new(b, h, n), new(b, h, p)
        weights = new(2 * e + 2 * n + 3 * h + m, d), meta(h), new(n), new(n), new(h, n), new(h, n), meta(h)
        a = mamba3_step.Arguments(new(b, d), *states, *weights, new(e) if norm else None, new(d, e))
        return functools.partial(advance_layer, a)

    for dtype, kind in DTYPES.items():
        yield Variant(f"{dtype}, d 768", call(kind), typical=dtype == "bf16")
        yield Variant(f"{dtype}, d 768, normed", call(kind, norm=True))
    yield Variant("bf16, p 20, n 5, m 2", call(torch.bfloat16, 2, 40, 4, 20, 5, 2, True))
