"""mamba2_step on our GPU kernels: three launches for the token of a layer.

project   [z, x, B, C, dt] = W_in norm(u), the convolution of x, B and C, its state (mamba_step/triton_kernels.py)
advance   dt, the recurrence and its state, the gate (triton_kernels.py)
project   out = W_out norm(y), added to the residual stream
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from ssmzoo.ops.in_place import next_state
from ssmzoo.ops.mamba2_step import mamba2_step
from ssmzoo.ops.mamba_step.triton import project, why_not
from ssmzoo.ops.triton import DEVICE, MISSING, on_device_of, power_of_2
from ssmzoo.ops.triton.variants import DTYPES, Passes, Variant, meta

PASSES = {"project": Passes(("E", "W"), most=100), "advance": Passes(("P", "N"), most=300)}

STATES = 1024  # numbers of a program's state, at most
TENSORS = 13  # of the arguments; numbers follow


def advance_layer(a, norm: Tensor | None = None, eps: float = 0.0, residual: bool = False):
    """mamba2_step, with a norm before it and the residual connection behind it if wanted."""
    from ssmzoo.ops.mamba2_step import triton_kernels as kernels

    u, (b, h, p, n), g = a.u, a.ssm_state.shape, a.ngroups
    e, new = h * p, functools.partial(a.u.new_empty, dtype=torch.float32)
    conv, ssm = next_state(a.conv_state, a.in_proj.dtype), next_state(a.ssm_state, torch.float32)
    convolution = (e, a.conv_state, a.conv_weight, a.conv_bias, conv)
    out = new(b, 2 * e + 2 * g * n + h)
    projected = project(u, a.in_proj, a.in_bias, out, norm=norm, eps=eps, conv=convolution)
    y, N = new(b, e), power_of_2(n)
    P = min(power_of_2(p), max(1, STATES // N))
    kernels.advance[-(-p // P), h, b](
        projected,
        a.dt_bias,
        a.A_log,
        a.D,
        a.ssm_state,
        ssm,
        y,
        h,
        p,
        n,
        g,
        a.dt_min,
        a.dt_max,
        D_OF_CHANNELS=a.D.numel() != h,
        P=P,
        N=N,
        num_warps=4,
    )
    out, add = u.new_empty(b, a.out_proj.shape[0]), u if residual else None
    return project(y, a.out_proj, a.out_bias, out, norm=a.norm_weight, eps=a.eps, add=add), conv, ssm


@mamba2_step.register("triton", device=DEVICE, missing=MISSING, unsupported=functools.partial(why_not, count=TENSORS))
def mamba2_step_triton(a) -> tuple[Tensor, Tensor, Tensor]:
    with on_device_of(a.u):
        return advance_layer(a)


def variants() -> Iterator[Variant]:
    d, h, p, n, k = 768, 24, 64, 128, 4
    c = h * p + 2 * n
    for dtype, kind in DTYPES.items():
        new = functools.partial(meta, dtype=kind)
        state = new(1, d), new(1, c, k), meta(1, h, p, n)
        weights = dict(in_proj=new(h * p + c + h, d), conv_weight=new(c, k), conv_bias=new(c), dt_bias=meta(h))
        weights |= dict(A_log=meta(h), D=meta(h), norm_weight=new(h * p), out_proj=new(d, h * p))
        a = mamba2_step.Arguments(*state, **weights, ngroups=1)
        yield Variant(f"{dtype}, d 768", functools.partial(advance_layer, a), typical=dtype == "bf16")
        normed = functools.partial(advance_layer, a, new(d), 1e-5, True)
        yield Variant(f"{dtype}, d 768, norm and residual connection", normed)
