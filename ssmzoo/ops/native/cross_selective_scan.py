"""cross_selective_scan on our compiled CPU kernels (cross_selective_scan.c)."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmzoo.ops.cross_selective_scan import cross_selective_scan
from ssmzoo.ops.dispatch import no_double_backward
from ssmzoo.ops.linear_act import linear_act
from ssmzoo.ops.native import VECTOR_LENGTH, commit, kernel, pack, why_not_float

FORWARD, MISSING = kernel("ssmzoo_cross_selective_scan_forward")
BACKWARD, _ = kernel("ssmzoo_cross_selective_scan_backward")
CHUNK = 32  # steps between saved states, as in the C file
COLUMNS = {"cross": 0b1010, "unidirectional": 0, "bidirectional": 0}
REVERSED = {"cross": 0b1100, "unidirectional": 0, "bidirectional": 0b1100}
MAX_TILES = 16  # tiles of channels that a task keeps in cache at once

_LIBRARY = torch.library.Library("ssmzoo", "FRAGMENT")
_ARGS = "Tensor u, Tensor steps, Tensor dt_proj, Tensor dt_bias, Tensor A, Tensor D, int columns, int backwards"
_LIBRARY.define(f"cross_selective_scan({_ARGS}, bool save) -> (Tensor, Tensor)")
_LIBRARY.define(
    f"cross_selective_scan_backward(Tensor dy, Tensor saved, {_ARGS}) -> (" + ", ".join(["Tensor"] * 6) + ")"
)


def _tiling(b: int, e: int) -> tuple[int, int]:
    """(tiles of channels per task, tasks per batch entry and pair of orders): few, so that rows stay in one piece."""
    tiles = -(-e // VECTOR_LENGTH)
    wanted = -(-2 * torch.get_num_threads() // max(1, 2 * b))
    per_task = max(1, min(MAX_TILES, -(-tiles // wanted)))
    return per_task, -(-tiles // per_task)


def _pack(
    tensors: list[Tensor | None], u: Tensor, dt_proj: Tensor, A: Tensor, columns: int, backwards: int, save: bool
) -> bytes:
    b, h, w, e = u.shape
    flat = [t.flatten(1, 2) if t is not None and t.ndim == 4 else t for t in tensors]
    return pack(
        flat,
        b,
        e,
        h,
        w,
        A.shape[1],
        dt_proj.shape[2],
        save,
        columns,
        backwards,
        _tiling(b, e)[0],
        torch.get_num_threads(),
    )


def _forward(u, steps, dt_proj, dt_bias, A, D, columns, backwards, save):
    """u (b h w e), steps (b h w 4(r+2n)) contiguous float32 -> y (b h w e), states at chunk starts"""
    b, h, w, e = u.shape
    y = u.new_empty(b, 2, h * w, e)
    chunks, lanes = -(-h * w // CHUNK), -(-e // VECTOR_LENGTH) * VECTOR_LENGTH
    saved = u.new_empty(b * 4 * chunks * lanes * A.shape[1] if save else 0)
    commit(y, saved)
    arguments = [u, steps, dt_proj, dt_bias, A, D, y, saved if save else None, *[None] * 7]
    FORWARD(_pack(arguments, u, dt_proj, A, columns, backwards, save))
    return (y[:, 0] + y[:, 1]).view(b, h, w, e), saved


def _backward(dy, saved, u, steps, dt_proj, dt_bias, A, D, columns, backwards):
    b, h, w, e = u.shape
    n, r = A.shape[1], dt_proj.shape[2]
    du, dsteps = u.new_empty(b, 2, h * w, e), u.new_empty(_tiling(b, e)[1], b, h * w * steps.shape[-1])
    dw, dbias, dA, dD = u.new_empty(b, 4, e * r), u.new_empty(b, 4, e), u.new_empty(b, 4 * e, n), u.new_empty(b, 4 * e)
    dy = dy.contiguous()
    commit(du, dsteps)
    arguments = [u, steps, dt_proj, dt_bias, A, D, None, saved, dy, du, dsteps, dw, dbias, dA, dD]
    BACKWARD(_pack(arguments, u, dt_proj, A, columns, backwards, True))
    return (
        (du[:, 0] + du[:, 1]).view_as(u),
        dsteps.sum(0).view_as(steps),
        dw.sum(0).view_as(dt_proj),
        dbias.sum(0),
        dA.sum(0),
        dD.sum(0),
    )


_LIBRARY.impl("cross_selective_scan", _forward, "CPU")
_LIBRARY.impl("cross_selective_scan_backward", _backward, "CPU")


@torch.library.register_fake("ssmzoo::cross_selective_scan", lib=_LIBRARY)
def _forward_fake(u, steps, dt_proj, dt_bias, A, D, columns, backwards, save):
    b, h, w, e = u.shape
    chunks, lanes = -(-h * w // CHUNK), -(-e // VECTOR_LENGTH) * VECTOR_LENGTH
    return torch.empty_like(u), u.new_empty(b * 4 * chunks * lanes * A.shape[1] if save else 0)


@torch.library.register_fake("ssmzoo::cross_selective_scan_backward", lib=_LIBRARY)
def _backward_fake(dy, saved, u, steps, dt_proj, dt_bias, A, D, columns, backwards):
    return tuple(torch.empty_like(t) for t in (u, steps, dt_proj, dt_bias, A, D))


def _setup(ctx, inputs, output):
    ctx.save_for_backward(output[1], *inputs[:6])
    ctx.orders = inputs[6:8]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _gradients(ctx, dy, _):
    if dy is None:
        return (None,) * 9
    return *torch.ops.ssmzoo.cross_selective_scan_backward(dy, *ctx.saved_tensors, *ctx.orders), None, None, None


torch.library.register_autograd("ssmzoo::cross_selective_scan", _gradients, setup_context=_setup, lib=_LIBRARY)
torch.library.register_autograd(
    "ssmzoo::cross_selective_scan_backward", no_double_backward("cross_selective_scan"), lib=_LIBRARY
)


def _why_not(x, x_proj, dt_proj, dt_bias, A, D, scans="cross"):
    return why_not_float(x, x_proj, dt_proj, dt_bias, A, D)


@cross_selective_scan.register("native", device="cpu", missing=MISSING, unsupported=_why_not)
def cross_selective_scan_native(x, x_proj, dt_proj, dt_bias, A, D, scans="cross"):
    u = x.permute(0, 2, 3, 1)
    steps = linear_act(u, x_proj.flatten(0, 1)).float().contiguous()  # (b h w 4(r+2n))
    tensors = u.float().contiguous(), steps, *(t.float().contiguous() for t in (dt_proj, dt_bias, A, D))
    save = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    y, _ = torch.ops.ssmzoo.cross_selective_scan(*tensors, COLUMNS[scans], REVERSED[scans], save)
    return y.to(x.dtype)
