"""selective_state_update, and with it ssd_state_update, on our GPU kernel (triton_kernels.py): one launch.

A row that does not exist cannot be told on a GPU without waiting for it: such a sequence gets NaN and changes nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from ssmzoo.ops.checks import why_not_float
from ssmzoo.ops.eager import eager, needs_grad
from ssmzoo.ops.library import in_place
from ssmzoo.ops.rows import checked
from ssmzoo.ops.selective_state_update import selective_state_update
from ssmzoo.ops.triton import DEVICE, MISSING, on_device_of, power_of_2, strides
from ssmzoo.ops.triton.variants import DTYPES, Passes, Variant, meta

PASSES = {"update": Passes(("E", "N"), most=100)}

TILE = 1024  # numbers of a program's state, at most


def _update(a) -> Tensor:
    from ssmzoo.ops.selective_state_update import triton_kernels as kernels

    out = torch.empty_like(a.x)
    plain = a.state.ndim == 3
    state, x, dt, A, D, z, dt_bias, y = a.state, a.x, a.dt, a.A, a.D, a.z, a.dt_bias, out
    if plain:  # one head
        state, x, dt, z, y = (None if t is None else t.unsqueeze(1) for t in (state, x, dt, z, y))
        A, D, dt_bias = (None if t is None else t.unsqueeze(0) for t in (A, D, dt_bias))
    B, C = (M.unsqueeze(1) if M.ndim == 2 else M for M in (a.B, a.C))
    rows = a.state_batch_indices
    if rows is not None and rows.is_cpu:
        checked(rows, a.state)
    (b, h, e), n, g = x.shape, state.shape[3], B.shape[1]
    N = power_of_2(n)
    E = min(power_of_2(e), max(1, TILE // N))
    tied = not plain and dt.stride(2) == 0 and A.stride()[1:] == (0, 0) and (dt_bias is None or dt_bias.stride(1) == 0)
    if out.numel():
        with on_device_of(x):
            kernels.update[(-(-e // E) * h * b,)](
                state,
                x,
                dt,
                A,
                B,
                C,
                D,
                z,
                dt_bias,
                rows,
                y,
                *map(strides, (state, x, dt, A, B, C, D, z, dt_bias, y)),
                h,
                e,
                n,
                (e if plain else h) // g,
                state.shape[0],
                BY_HEAD=not plain or g == 1,
                TIED=tied,
                SOFTPLUS=a.dt_softplus,
                E=E,
                N=N,
                num_warps=4 if E * N >= 512 else 1,
            )
    return out


TRACED = in_place("selective_state_update_triton", selective_state_update.Arguments, "state", _update, like="x")


def why_not(a) -> str | None:
    given = (a.state, a.x, a.dt, a.A, a.B, a.C, a.D, a.z, a.dt_bias)
    return "has no backward; the torch backend does" if needs_grad(*given) else why_not_float(*given)


@selective_state_update.register("triton", device=DEVICE, missing=MISSING, unsupported=why_not)
def selective_state_update_triton(a) -> Tensor:
    return _update(a) if eager(a.x, a.state) else TRACED(*a)


def variants() -> Iterator[Variant]:
    for dtype, kind in DTYPES.items():
        for heads, n in (((64, 64), 128), ((1536,), 16)):
            state, A = meta(8, *heads, n), meta(*heads, n)
            x, dt, z = (meta(8, *heads, dtype=kind) for _ in range(3))
            B, C = (meta(8, *(1,) * (len(heads) - 1), n, dtype=kind) for _ in "BC")
            a = selective_state_update.Arguments(
                state, x, dt, A, B, C, D=meta(*heads), z=z, dt_bias=meta(*heads), dt_softplus=True
            )
            label = f"{dtype}, 8 sequences, {' x '.join(map(str, heads))} channels, n {n}"
            yield Variant(label, functools.partial(_update, a), typical=dtype == "bf16" and n == 128)
