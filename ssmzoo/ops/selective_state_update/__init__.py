"""The selective scan's decoding step: the state is advanced by one token, in place."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmzoo.ops.checks import compute_dtype, expect_floats
from ssmzoo.ops.dispatch import op
from ssmzoo.ops.rows import expect_indices, read_rows, without_padding, write_rows


def check_selective_state_update(a) -> None:
    row = "b" if a.state_batch_indices is None else "rows"
    if a.state.ndim == 4:
        state, tokens, channels = (row, "h", "e", "n"), "bhe", "he"
    else:
        state, tokens, channels = (row, "e", "n"), "be", "e"
    sizes = expect_floats(a, {}, state=state, x=tokens, dt=tokens, z=tokens, A=state[1:], D=channels, dt_bias=channels)
    expect_floats(a, sizes, B="bgn" if a.B.ndim == 3 else "bn", C="bgn" if a.C.ndim == 3 else "bn")
    outer, groups = channels[0], sizes.get("g", 1)
    if groups == 0 or sizes[outer] % groups:
        raise ValueError(f"B, C have {groups} groups, which do not divide {outer}={sizes[outer]} of state")
    expect_indices("state_batch_indices", a.state_batch_indices, a.state.device, sizes)


@op(check=check_selective_state_update)
def selective_state_update(
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
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """Advance the selective scan by one token, in place on `state`.

        h <- exp(dt A) h + dt B x        y = (<h, C> + D x) * SiLU(z)

    state        (b e n) or (b h e n)  updated in place
    x, dt, z     (b e) or (b h e)      input, time step, optional gate
    A            (e n) or (h e n)      real and negative, fp32
    B, C         (b n) or (b g n)      channel (or head) i uses group i // (e/g)
    D, dt_bias   (e) or (h e)
    state_batch_indices (b)            integers: the row of `state`, which may have more, that each sequence has;
                                       negative for padding, where y is 0 and no state changes
    returns      (b e) or (b h e) in x's dtype

    Raises ValueError when shapes disagree, IndexError for a row that does not exist. The signature is
    mamba-ssm's. Source: Gu & Dao 2023, section 3.
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
    rows = read_rows(state, state_batch_indices)
    before = rows.to(dtype, copy=torch.is_grad_enabled())  # the backward wants it, and it is overwritten below
    h = torch.exp(dt[..., None] * A.to(dtype)) * before + (dt * x_)[..., None] * B
    write_rows(state, state_batch_indices, h)
    y = (h * C).sum(-1)
    if D is not None:
        y = y + D.to(dtype) * x_
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return without_padding(y.to(x.dtype), state_batch_indices)
