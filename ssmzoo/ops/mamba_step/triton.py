"""mamba_step on our GPU kernels (triton_kernels.py): four launches for the token of a layer, weights read as they lie.

Everything between the input and the result is kept in fp32.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from ssmzoo.ops.checks import why_not_float
from ssmzoo.ops.eager import eager
from ssmzoo.ops.in_place import next_state
from ssmzoo.ops.mamba_step import mamba_step
from ssmzoo.ops.triton import ALL_REGISTERS, DEVICE, MISSING, on_device_of, power_of_2
from ssmzoo.ops.triton.variants import DTYPES, Passes, Variant, meta

PASSES = {"project": Passes(("E", "W"), most=100), "advance": Passes(("E", "N"), most=300)}

MAX_ROWS = 8  # sequences: each reads the weights by itself, from the cache; for more, products of matrices are faster
ROWS, COLUMNS, STATES = 4, 512, 512  # of a program: rows and columns of a matrix, numbers of the state, at most


def project(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    add: Tensor | None = None,
    conv: tuple[int, Tensor, Tensor, Tensor | None, Tensor] | None = None,
) -> Tensor:
    """out (b rows) = weight norm(x) + bias + add.

    conv   (first row, state (b c k), weight (c k), bias, new state): rows that go through a convolution and SiLU
    """
    from ssmzoo.ops.mamba_step import triton_kernels as kernels

    first, conv_in, conv_weight, conv_bias, conv_out = (0, None, None, None, None) if conv is None else conv
    (b, rows), width = out.shape, x.shape[1]
    E, K = min(ROWS, power_of_2(rows)), 0 if conv is None else conv_in.shape[2]
    kernels.project[-(-rows // E), b](
        x,
        norm,
        weight,
        bias,
        add,
        conv_in,
        conv_weight,
        conv_bias,
        conv_out,
        out,
        x.stride(0),
        out.stride(0),
        0 if add is None else add.stride(0),
        rows,
        width,
        first,
        0 if conv is None else conv_in.shape[1],
        eps,
        K=K,
        E=E,
        W=min(COLUMNS, power_of_2(width)),
        KP=power_of_2(K),
        num_warps=4,
        **ALL_REGISTERS,
    )
    return out


def advance_layer(a, norm: Tensor | None = None, eps: float = 0.0, residual: bool = False):
    """mamba_step, with a norm before it and the residual connection behind it if wanted."""
    from ssmzoo.ops.mamba_step import triton_kernels as kernels

    u, (e, n), r = a.u, a.A_log.shape, a.dt_proj.shape[1]
    b, new = u.shape[0], u.new_empty
    kind = u.dtype if a.in_proj is None else a.in_proj.dtype  # the stream may be wider than the layer
    conv, ssm = next_state(a.conv_state, kind), next_state(a.ssm_state, torch.float32)
    convolution = (0, a.conv_state, a.conv_weight, a.conv_bias, conv)
    xz = project(u, a.in_proj, a.in_bias, new(b, 2 * e, dtype=torch.float32), norm=norm, eps=eps, conv=convolution)
    steps = project(xz[:, :e], a.x_proj, None, new(b, r + 2 * n, dtype=torch.float32))
    y = new(b, e, dtype=u.dtype if a.out_proj is None else torch.float32)
    N, R = power_of_2(n), power_of_2(r)
    E = min(power_of_2(e), max(1, STATES // N))
    kernels.advance[-(-e // E), b](
        xz, steps, a.dt_proj, a.dt_bias, a.A_log, a.D, a.ssm_state, ssm, y, e, n, r, E=E, N=N, R=R, num_warps=2
    )
    if a.out_proj is not None:
        out = new(b, a.out_proj.shape[0])
        y = project(y, a.out_proj, a.out_bias, out, add=u if residual else None)
    return y, conv, ssm


def why_not(a, count: int | None = None) -> str | None:
    """Why the kernels do not serve the step of a whole mixer.

    count  how many of the arguments are tensors, u the first of them; None: all
    """
    if torch.is_grad_enabled():
        return "serves decoding: without gradients"
    if a.u.shape[0] > MAX_ROWS:
        return f"serves up to {MAX_ROWS} sequences, got {a.u.shape[0]}; the torch form multiplies matrices"
    return why_not_tensors(*a[:count])


def why_not_tensors(*tensors: Tensor | None) -> str | None:
    if not eager(*tensors):
        return "is neither traced nor transformed: compilers fuse by themselves"
    for t in tensors:
        if t is None:
            continue
        if t.device != tensors[0].device:
            return f"wants all tensors on one device, got {tensors[0].device} and {t.device}"
        if not t.is_contiguous():
            return f"computes with contiguous tensors, got strides {t.stride()}"
        if not t.numel():
            return "is given nothing to do"
    return why_not_float(*tensors)


@mamba_step.register("triton", device=DEVICE, missing=MISSING, unsupported=why_not)
def mamba_step_triton(a) -> tuple[Tensor, Tensor, Tensor]:
    with on_device_of(a.u):
        return advance_layer(a)


def variants() -> Iterator[Variant]:
    d, e, n, r, k = 768, 1536, 16, 48, 4
    for dtype, kind in DTYPES.items():
        new = functools.partial(meta, dtype=kind)
        state = new(1, d), new(1, e, k), meta(1, e, n)
        weights = dict(conv_weight=new(e, k), conv_bias=new(e), x_proj=new(r + 2 * n, e), dt_proj=new(e, r))
        weights |= dict(dt_bias=meta(e), A_log=meta(e, n), D=meta(e), in_proj=new(2 * e, d), out_proj=new(d, e))
        a = mamba_step.Arguments(*state, **weights)
        yield Variant(f"{dtype}, d 768", functools.partial(advance_layer, a), typical=dtype == "bf16")
        normed = functools.partial(advance_layer, a, new(d), 1e-5, True)
        yield Variant(f"{dtype}, d 768, norm and residual connection", normed)
