"""The selective scan of Mamba: an input-dependent diagonal recurrence along time."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmzoo.ops.checks import compute_dtype, expect, expect_floats, expect_seq_idx, resets
from ssmzoo.ops.dispatch import op
from ssmzoo.ops.library import Differentiable, Kernel, without


def check_selective_scan(a) -> None:
    sizes = expect_floats(a, {}, u="bel", delta="bel", D="e", z="bel", delta_bias="e")
    expect("A", a.A, "en", sizes)
    length = "l"
    if a.A.is_complex():
        length, sizes["2l"] = "2l", 2 * sizes["l"]
        expect("initial_state", a.initial_state, "ben", sizes)
    else:
        expect_floats(a, sizes, A="en", B="...", C="...", initial_state="ben")
    groups = [_groups("B", a.B, length, sizes), _groups("C", a.C, length, sizes)]
    if groups[0] != groups[1] and 1 not in groups:
        raise ValueError(f"B has {groups[0]} groups but C has {groups[1]}; expected as many, or one")
    expect_seq_idx(a.seq_idx, a.u.device, sizes)


def _groups(name: str, M: Tensor, length: str, sizes: dict[str, int]) -> int:
    """Of B or C, whose shape is checked."""
    if M.ndim == 4 and M.shape[1] and sizes["e"] % M.shape[1] == 0:
        expect(name, M.select(1, 0), ("b", "n", length), sizes)
        return M.shape[1]
    if M.ndim == 4:
        raise ValueError(f"{name} has {M.shape[1]} groups, which do not divide the {sizes['e']} channels of u")
    if M.ndim not in (2, 3):
        raise ValueError(f"{name} has shape {tuple(M.shape)}, expected (e, n), (b, n, l) or (b, g, n, l)")
    expect(name, M, "en" if M.ndim == 2 else ("b", "n", length), sizes)
    return 1


@op(check=check_selective_scan)
def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run the input-dependent diagonal recurrence of Mamba along the last axis.

        h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t        y_t = (<h_t, C_t> + D u_t) * SiLU(z_t)

    u, delta, z    (b e l)  input, time step (positive after the softplus, in tokens), optional gate; any strides
    A              (e n)    real and negative, fp32: decay per unit of time
    B, C           (e n) constant, (b n l), or (b g n l) where channel i uses group i // (e/g)
    D, delta_bias  (e)      skip weight; bias added before the softplus, once
    initial_state  (b e n)  h before the first token, zero by default; gradients flow through it
    seq_idx        (b l)    integers; where the value changes from t-1 to t, h is set to zero before t
    returns        (b e l) in u's dtype; with return_last_state also h after the last token, (b e n) in fp32

    Everything is computed in fp32 (fp64 if an input is). A may be complex on the reference backend: then B, C of length
    2l hold interleaved real and imaginary parts, and <h, C> is 2 Re(sum h C).

    Raises ValueError when shapes, dtypes or devices disagree, naming the argument. The signature is mamba-ssm's plus
    initial_state and seq_idx. Source: Gu & Dao 2023 (arXiv 2312.00752), section 3.
    """
    dtype = compute_dtype(u, delta, A, B, C)
    length = u.shape[2]
    with torch.autocast(u.device.type, enabled=False):
        x, dt = u.to(dtype), delta.to(dtype)
        if delta_bias is not None:
            dt = dt + delta_bias.to(dtype)[:, None]
        if delta_softplus:
            dt = F.softplus(dt)
        A = A.to(torch.promote_types(dtype, torch.complex64)) if A.is_complex() else A.to(dtype)
        B_at, C_at = _per_step(B, u.shape[1], A.dtype), _per_step(C, u.shape[1], A.dtype)
        h = A.new_zeros(u.shape[0], *A.shape) if initial_state is None else initial_state.to(A.dtype)
        reset = None if seq_idx is None else resets(seq_idx)[:, None, None]  # (b 1 1 l)
        ys = []
        for t in range(length):
            if reset is not None:
                h = torch.where(reset[..., t], torch.zeros_like(h), h)
            h = torch.exp(dt[:, :, t, None] * A) * h + (dt[:, :, t] * x[:, :, t])[..., None] * B_at(t)
            y = (h * C_at(t)).sum(-1)
            ys.append(2 * y.real if y.is_complex() else y)
        y = torch.stack(ys, dim=2) if ys else x * 0
        if D is not None:
            y = y + D.to(dtype)[:, None] * x
        if z is not None:
            y = y * F.silu(z.to(dtype))
    out = y.to(u.dtype)
    return (out, h) if return_last_state else out


def _per_step(M: Tensor, channels: int, dtype: torch.dtype):
    """The function t -> M_t, broadcastable to (b e n), of a constant or time-dependent B or C."""
    if M.ndim == 2:
        M = M.to(dtype)
        return lambda t: M
    M = M.unsqueeze(1) if M.ndim == 3 else M  # b g n l
    if dtype.is_complex:
        M = torch.view_as_complex(M.to(dtype.to_real()).unflatten(-1, (-1, 2)).contiguous())
    M = M.to(dtype)
    return lambda t: M[..., t].repeat_interleave(channels // M.shape[1], dim=1)


def empty_gradients(a) -> dict[str, Tensor]:
    """Uninitialised gradients: sequences in the layout of their arguments, B and C with states next to each other."""
    grads = {name: torch.empty_like(t) for name in ("u", "delta", "z") if (t := getattr(a, name)) is not None}
    for name, t in zip(a._fields, a):
        if not isinstance(t, Tensor) or name in grads or not t.is_floating_point():
            continue
        if t.ndim == 4:
            b, g, n, l = t.shape
            grads[name] = t.new_empty(b, g, l, n).permute(0, 1, 3, 2)
        else:
            grads[name] = t.new_empty(t.shape)
    return grads


def empty_results(a) -> tuple[Tensor, Tensor]:
    """Uninitialised output (as u) and last state (b e n)."""
    dtype = compute_dtype(a.u, a.delta, a.A, a.B, a.C)
    return torch.empty_like(a.u), a.u.new_empty(*a.u.shape[:2], a.A.shape[1], dtype=dtype)


# The kernels are given B and C as (e n), or as (b g n l) with the same g for both.
SCAN = Differentiable(
    "selective_scan",
    without(selective_scan_fn.Arguments, "return_last_state"),
    ("out", "last_state"),
    saved="saved",
    like=empty_results,
    gradients=empty_gradients,
    refer="reference",
)


def register(backend: str, kernel: Kernel, **why_not) -> None:
    """Serve selective_scan_fn by a kernel; the keywords are those of Backend."""

    SCAN.kernels[backend] = kernel
    eager = functools.partial(_with_equal_groups, functools.partial(SCAN.eager, backend))
    traced = functools.partial(_with_equal_groups, lambda inputs: SCAN(inputs, backend))
    selective_scan_fn.register(backend, eager=eager, **why_not)(traced)


LAST = selective_scan_fn.Arguments._fields.index("return_last_state")  # no argument of the kernels


def _with_equal_groups(scan: Callable, a: tuple) -> Tensor | tuple[Tensor, Tensor]:
    B, C = a.B, a.C
    B, C = B.unsqueeze(1) if B.ndim == 3 else B, C.unsqueeze(1) if C.ndim == 3 else C
    if B.ndim == C.ndim == 4 and B.shape[1] != C.shape[1]:
        groups = max(B.shape[1], C.shape[1])
        B, C = B.expand(-1, groups, -1, -1), C.expand(-1, groups, -1, -1)
    out, last_state = scan(SCAN.Inputs(*a[:3], B, C, *a[5:LAST], *a[LAST + 1 :]))
    return (out, last_state) if a.return_last_state else out


def why_not_complex(a) -> str | None:
    return "complex A runs on the reference backend only" if a.A.is_complex() else None


def groups_of(a) -> int:
    return a.B.shape[1] if a.B.ndim == 4 else a.C.shape[1] if a.C.ndim == 4 else 1
