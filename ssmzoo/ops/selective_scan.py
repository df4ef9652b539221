"""The selective scan of Mamba: an input-dependent diagonal recurrence along time, and its single decoding step."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmzoo.ops import selective_scan_torch as chunked
from ssmzoo.ops.checks import compute_dtype, expect, expect_floats, expect_seq_idx, resets
from ssmzoo.ops.dispatch import op
from ssmzoo.ops.selective_scan_op import KERNELS, scan_with


def check_selective_scan(
    u,
    delta,
    A,
    B,
    C,
    D=None,
    z=None,
    delta_bias=None,
    delta_softplus=False,
    return_last_state=False,
    *,
    initial_state=None,
    seq_idx=None,
) -> None:
    sizes: dict[str, int] = {}
    expect("u", u, ("b", "e", "l"), sizes)
    expect("delta", delta, ("b", "e", "l"), sizes)
    expect("A", A, ("e", "n"), sizes)
    for name, value in (("B", B), ("C", C)):
        if value.ndim not in (2, 3, 4):
            raise ValueError(f"{name} has shape {tuple(value.shape)}, expected (e, n), (b, n, l) or (b, g, n, l)")
        length = "l" if not A.is_complex() or value.ndim == 2 else "2l"
        sizes["2l"] = 2 * sizes["l"]
        if value.ndim == 2:
            expect(name, value, ("e", "n"), sizes)
        elif value.ndim == 3:
            expect(name, value, ("b", "n", length), sizes)
        else:
            expect(name, value, ("b", f"g of {name}", "n", length), sizes)
            groups = value.shape[1]
            if groups == 0 or sizes["e"] % groups:
                raise ValueError(f"{name} has {groups} groups, which do not divide the {sizes['e']} channels of u")
    if sizes.get("g of B", 1) != sizes.get("g of C", 1) and 1 not in (sizes.get("g of B", 1), sizes.get("g of C", 1)):
        raise ValueError(f"B has {sizes['g of B']} groups but C has {sizes['g of C']}; expected as many, or one")
    if D is not None:
        expect("D", D, ("e",), sizes)
    if z is not None:
        expect("z", z, ("b", "e", "l"), sizes)
    if delta_bias is not None:
        expect("delta_bias", delta_bias, ("e",), sizes)
    if initial_state is not None:
        expect("initial_state", initial_state, ("b", "e", "n"), sizes)
    expect_floats(u.device, u=u, delta=delta, D=D, z=z, delta_bias=delta_bias)
    if not A.is_complex():
        expect_floats(u.device, A=A, B=B, C=C, initial_state=initial_state)
    expect_seq_idx(seq_idx, u.device, sizes)


@op(check=check_selective_scan)
def selective_scan_fn(
    u,
    delta,
    A,
    B,
    C,
    D=None,
    z=None,
    delta_bias=None,
    delta_softplus=False,
    return_last_state=False,
    *,
    initial_state=None,
    seq_idx=None,
):
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


def why_not_chunked(u, delta, A, B, C, *args, **kwargs) -> str | None:
    return "complex A runs on the reference backend only" if A.is_complex() else None


KERNELS["torch"] = chunked.KERNEL
selective_scan_fn.register("torch", unsupported=why_not_chunked, composite=selective_scan_fn.reference)(
    scan_with("torch")
)


def check_selective_state_update(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False) -> None:
    sizes: dict[str, int] = {}
    heads = ("h",) if state.ndim == 4 else ()
    channels = (*heads, "e")
    expect("state", state, ("b", *channels, "n"), sizes)
    expect("x", x, ("b", *channels), sizes)
    expect("dt", dt, ("b", *channels), sizes)
    expect("A", A, (*channels, "n"), sizes)
    for name, value in (("B", B), ("C", C)):
        expect(name, value, ("b", "g", "n") if value.ndim == 3 else ("b", "n"), sizes)
    outer = heads[0] if heads else "e"
    if sizes.get("g", 1) == 0 or sizes[outer] % sizes.get("g", 1):
        raise ValueError(f"B, C have {sizes['g']} groups, which do not divide {outer}={sizes[outer]} of state")
    if D is not None:
        expect("D", D, channels, sizes)
    if z is not None:
        expect("z", z, ("b", *channels), sizes)
    if dt_bias is not None:
        expect("dt_bias", dt_bias, channels, sizes)
    expect_floats(state.device, state=state, x=x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias)


@op(check=check_selective_state_update)
def selective_state_update(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False):
    """Advance the selective scan by one token, in place on `state`.

        h <- exp(dt A) h + dt B x        y = (<h, C> + D x) * SiLU(z)

    state        (b e n) or (b h e n)  updated in place
    x, dt, z     (b e) or (b h e)      input, time step, optional gate
    A            (e n) or (h e n)      real and negative, fp32
    B, C         (b n) or (b g n)      channel (or head) i uses group i // (e/g)
    D, dt_bias   (e) or (h e)
    returns      (b e) or (b h e) in x's dtype

    Raises ValueError when shapes disagree. The signature is mamba-ssm's. Source: Gu & Dao 2023, section 3.
    """
    dtype = compute_dtype(state, x, dt, A)
    x_, dt = x.to(dtype), dt.to(dtype)
    if dt_bias is not None:
        dt = dt + dt_bias.to(dtype)
    if dt_softplus:
        dt = F.softplus(dt)
    B, C = (M.to(dtype).reshape(M.shape[0], -1, M.shape[-1]) for M in (B, C))  # b g n
    B, C = (M.repeat_interleave(x.shape[1] // M.shape[1], dim=1) for M in (B, C))
    if state.ndim == 4:
        B, C = B[:, :, None], C[:, :, None]
    before = state.to(dtype, copy=torch.is_grad_enabled())  # the backward wants it, and it is overwritten below
    h = torch.exp(dt[..., None] * A.to(dtype)) * before + (dt * x_)[..., None] * B
    state.copy_(h)
    y = (h * C).sum(-1)
    if D is not None:
        y = y + D.to(dtype) * x_
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(x.dtype)


selective_state_update.register("torch")(selective_state_update.reference)  # already vectorised
