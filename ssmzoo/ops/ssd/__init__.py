"""State-space duality: the scan of Mamba-2, whose decay is one scalar per head, as masked matrix products over chunks.

    S_t = exp(a_t) S_{t-1} + X_t (outer) B_t          y_t = S_t C_t

Inside a chunk of q positions the same numbers are a masked attention, Y = (L o C B^T) X with
L_ts = exp(a_{s+1} + ... + a_t) for s <= t, so that nearly all the work is matrix products; only one state per chunk is
carried on. `ssd_scan` is this recurrence; `mamba_chunk_scan_combined` puts the time step, skip and gate around it.

Letters: b batch, l length, h heads, p width of a head, g groups sharing B and C, n state size, c chunks of q.
Source: Dao & Gu 2024 (arXiv 2405.21060), sections 3 and 6; state-spaces/mamba ops/triton/ssd_combined.py for the
signature, modules/ssd_minimal.py for the minimal form.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmzoo.ops.checks import compute_dtype, expect, expect_floats, expect_seq_idx, resets
from ssmzoo.ops.dispatch import op
from ssmzoo.ops.library import Differentiable, Kernel
from ssmzoo.ops.selective_state_update import selective_state_update
from ssmzoo.ops.ssd.varlen import expect_cu_seqlens, varlen_states

TORCH_CHUNK = 64  # longer chunks cost more than they save once q exceeds the width of a head


def check_ssd_scan(a) -> None:
    _check_heads(a, "X", X="blhp", a="blh")


def check_combined(a) -> None:
    D = "hp" if a.D is not None and a.D.ndim == 2 else "h"
    sizes = _check_heads(a, "x", x="blhp", dt="blh", A="h", D=D, z="blhp", dt_bias="h")
    if isinstance(a.cu_seqlens, bool):
        raise ValueError(f"cu_seqlens is {a.cu_seqlens}: dt_softplus stands behind it, as upstream; give it by name")
    if a.return_varlen_states:
        if a.cu_seqlens is None:
            raise ValueError("return_varlen_states wants cu_seqlens, where the sequences begin and the last one ends")
        if sizes["b"] != 1:
            raise ValueError(f"x has {sizes['b']} batch elements, expected 1 packed one with return_varlen_states")
        expect_cu_seqlens(a.cu_seqlens, a.x.device)
    if a.state_dtype is not None and not a.state_dtype.is_floating_point:
        raise ValueError(f"state_dtype is {a.state_dtype}, expected a floating-point dtype")
    if len(a.dt_limit) != 2 or not a.dt_limit[0] <= a.dt_limit[1]:
        raise ValueError(f"dt_limit = {tuple(a.dt_limit)}, expected (lowest, highest) in tokens")


def _check_heads(a, name: str, /, **axes: str) -> dict[str, int]:
    sizes = expect_floats(a, {}, **axes, B="blgn", C="blgn", initial_states="bhpn")
    if sizes["g"] == 0 or sizes["h"] % sizes["g"]:
        raise ValueError(f"B has {sizes['g']} groups, which do not divide the {sizes['h']} heads of {name}")
    if a.chunk_size < 1:
        raise ValueError(f"chunk_size = {a.chunk_size}, expected at least 1")
    expect_seq_idx(a.seq_idx, a[0].device, sizes)
    return sizes


@op(check=check_ssd_scan)
def ssd_scan(
    X: Tensor,
    a: Tensor,
    B: Tensor,
    C: Tensor,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    chunk_size: int = TORCH_CHUNK,
) -> tuple[Tensor, Tensor]:
    """The bare recurrence S_t = exp(a_t) S_{t-1} + X_t (outer) B_t, y_t = S_t C_t.

    X          (b l h p)  input, already multiplied by the time step
    a          (b l h)    logarithm of the decay, dt * A, at most 0 for a stable scan
    B, C       (b l g n)  head i uses group i // (h/g)
    initial_states (b h p n), seq_idx (b l): as in `mamba_chunk_scan_combined`
    returns    (b l h p) in X's dtype and the last state (b h p n), fp32 (float64 for float64 input)
    """
    b, l, h, p = X.shape
    g, n = B.shape[2:]
    dtype = compute_dtype(X, a, B, C)
    B, C = (v.to(dtype).repeat_interleave(h // g, dim=2) for v in (B, C))
    state = X.new_zeros(b, h, p, n, dtype=dtype) if initial_states is None else initial_states.to(dtype)
    reset = None if seq_idx is None else resets(seq_idx)
    ys = []
    for t in range(l):
        if reset is not None:
            state = torch.where(reset[:, t].view(b, 1, 1, 1), 0.0, state)
        decay = a[:, t].to(dtype).exp().view(b, h, 1, 1)
        state = decay * state + X[:, t].to(dtype).unsqueeze(-1) * B[:, t].unsqueeze(-2)
        ys.append((state * C[:, t].unsqueeze(-2)).sum(-1))
    y = torch.stack(ys, dim=1) if ys else X.new_zeros(b, 0, h, p, dtype=dtype)
    return y.to(X.dtype), state


@op(check=check_combined)
def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int = 256,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    return_varlen_states: bool = False,
    state_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Run Mamba-2's recurrence with time step, skip and gate; drop-in for mamba-ssm's function of this name.

        dt = clamp(softplus(dt + dt_bias), dt_limit)
        S_t = exp(dt_t A) S_{t-1} + dt_t x_t (outer) B_t      y_t = (S_t C_t + D x_t) * SiLU(z_t)

    x, z       (b l h p)  input and optional gate
    dt         (b l h)    time step; positive (in tokens) after dt_softplus and dt_limit, clamped in this order
    A          (h)        real and negative, fp32; decay per unit of time
    B, C       (b l g n)  head i uses group i // (h/g)
    chunk_size            kept for compatibility: an upper bound that backends may go below; any l is accepted
    D, dt_bias            (h) or (h p) skip weight; (h) bias added before the softplus
    initial_states        (b h p n) fp32 state before the first position, zero when missing
    seq_idx    (b l) int  where it changes from t-1 to t, the state is set to 0 before t
    cu_seqlens (s+1) int  starts of the s sequences of a packed batch (b = 1) and the end of the last; only used with
                          return_varlen_states, while seq_idx says where states are reset
    returns    (b l h p)  in x's dtype; with return_final_states also the last state (b h p n), with
                          return_varlen_states also that behind each sequence (s h p n); states are in fp32 (float64
                          for float64 input) or in state_dtype

    Gradients flow through all results. Raises ValueError naming the argument, its shape and the one expected.
    """
    dtype = compute_dtype(x, dt, A, B, C)
    dt = time_steps(dt.to(dtype), dt_bias, dt_softplus, dt_limit)
    y, state = ssd_scan.reference(x.to(dtype) * dt.unsqueeze(-1), dt * A.to(dtype), B, C, initial_states, seq_idx)
    if D is not None:
        y = y + x.to(dtype) * (D if D.ndim == 2 else D.unsqueeze(-1).expand(x.shape[2:])).to(dtype)
    if z is not None:
        y = y * F.silu(z.to(dtype))
    states = [state] if return_final_states else []
    if return_varlen_states:
        states.append(varlen_states(x, dt, A, B, cu_seqlens, initial_states))
    return with_states(y.to(x.dtype), states, state_dtype)


def with_states(y: Tensor, states: list[Tensor], state_dtype: torch.dtype | None) -> Tensor | tuple[Tensor, ...]:
    """What `mamba_chunk_scan_combined` returns: y alone, or with the states that were asked for."""
    return (y, *(s.to(state_dtype or s.dtype) for s in states)) if states else y


def time_steps(dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool, dt_limit: tuple[float, float]) -> Tensor:
    """dt (b l h) after bias, softplus and limits."""
    if dt_bias is not None:
        dt = dt + dt_bias.to(dt.dtype)
    if dt_softplus:
        dt = F.softplus(dt)
    if dt_limit[0] > 0 or dt_limit[1] < math.inf:
        dt = dt.clamp(dt_limit[0], dt_limit[1])
    return dt


class Recurrence(NamedTuple):
    """S_t = exp(log_decay_t) S_{t-1} + dt_t x_t (outer) B_t, y_t = S_t C_t + D x_t: what the kernels compute.

    x (b l h p), dt (b l h), log_decay (b l h), B, C (b l g n), D (h p), initial_states (b h p n), seq_idx (b l)
    """

    x: Tensor
    dt: Tensor | None
    log_decay: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None = None
    initial_states: Tensor | None = None
    seq_idx: Tensor | None = None


def empty_results(a: Recurrence) -> tuple[Tensor, Tensor]:
    """Uninitialised y (as x, contiguous) and last state (b h p n)."""
    _, _, h, p = a.x.shape
    state = a.x.new_empty(a.x.shape[0], h, p, a.B.shape[3], dtype=compute_dtype(a.x, a.log_decay, a.B, a.C))
    return a.x.new_empty(a.x.shape), state


SCAN = Differentiable("ssd", Recurrence, ("y", "state"), saved="saved", like=empty_results, refer="reference")


def register(backend: str, kernel: Kernel, why_not: Callable, **keywords) -> None:
    """Serve ssd_scan and mamba_chunk_scan_combined by a kernel that computes a Recurrence.

    why_not takes all floating-point tensors of a call, x and B first; the keywords are those of Backend.
    """
    SCAN.kernels[backend] = kernel

    def bare(a):
        return SCAN(Recurrence(a.X, None, a.a, a.B, a.C, None, a.initial_states, a.seq_idx), backend)

    def why_not_bare(a):
        return why_not(a.X, a.B, a.a, a.C, a.initial_states)

    def why_not_combined(a):
        return why_not(a.x, a.B, a.dt, a.A, a.C, a.D, a.z, a.dt_bias, a.initial_states)

    ssd_scan.register(backend, unsupported=why_not_bare, **keywords)(bare)
    mamba_chunk_scan_combined.register(backend, unsupported=why_not_combined, **keywords)(
        functools.partial(around_scan, lambda r, chunk_size: SCAN(r, backend))
    )


def around_scan(scan: Callable, a) -> Tensor | tuple[Tensor, ...]:
    """mamba_chunk_scan_combined by scan(recurrence, chunk_size) -> y, state: the time steps before, the gate after."""
    dtype = compute_dtype(a.x, a.dt, a.A, a.B, a.C)
    dt = time_steps(a.dt.to(dtype), a.dt_bias, a.dt_softplus, a.dt_limit)
    D = a.D if a.D is None or a.D.ndim == 2 else a.D.unsqueeze(-1).expand(a.x.shape[2:])
    x = a.x if a.z is None else a.x.to(dtype)  # rounds once, after the gate
    y, state = scan(Recurrence(x, dt, dt * a.A.to(dtype), a.B, a.C, D, a.initial_states, a.seq_idx), a.chunk_size)
    if a.z is not None:
        y = (y * F.silu(a.z.to(dtype))).to(a.x.dtype)
    states = [state] if a.return_final_states else []
    if a.return_varlen_states:
        states.append(varlen_states(a.x, dt, a.A, a.B, a.cu_seqlens, a.initial_states))
    return with_states(y, states, a.state_dtype)


def ssd_minimal_discrete(
    X: Tensor, A: Tensor, B: Tensor, C: Tensor, block_len: int, initial_states: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The one-page form of the paper (listing 1): X (b l h p) already multiplied by dt, A (b l h) the log decay,
    B, C (b l h n), initial_states (b 1 h p n); returns Y (b l h p) and the last state (b h p n)."""
    if initial_states is not None:
        if initial_states.ndim != 5 or initial_states.shape[1] != 1:
            raise ValueError(f"initial_states has shape {tuple(initial_states.shape)}, expected (b, 1, h, p, n)")
        initial_states = initial_states[:, 0]
    return ssd_scan(X, A, B, C, initial_states, chunk_size=block_len)


def ssd_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> Tensor:
    """One decoding step of `mamba_chunk_scan_combined`, in place on `state` (b h p n).

    x, z       (b h p)
    dt         (b h)    clamp it beforehand where the model has a dt_limit (then without dt_softplus)
    A, dt_bias (h)
    B, C       (b g n)
    D          (h) or (h p)
    returns    (b h p) in x's dtype

    The same step as `selective_state_update`, which takes everything per channel, with one value per head.
    """
    sizes: dict[str, int] = {}
    expect("state", state, ("b", "h", "p", "n"), sizes)
    expect("dt", dt, ("b", "h"), sizes)
    expect("A", A, ("h",), sizes)
    if dt_bias is not None:
        expect("dt_bias", dt_bias, ("h",), sizes)
    if D is not None:
        expect("D", D, ("h", "p") if D.ndim == 2 else ("h",), sizes)
    _, h, p, n = state.shape
    D, dt_bias = (v if v is None or v.ndim == 2 else v[:, None].expand(h, p) for v in (D, dt_bias))
    dt, A = dt[..., None].expand(*dt.shape, p), A[:, None, None].expand(h, p, n)
    return selective_state_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)
