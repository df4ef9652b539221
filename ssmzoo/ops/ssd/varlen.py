"""The state of Mamba-2's scan behind every sequence of a packed batch, from which each can be decoded on its own.

    S_i = sum over the tokens t of sequence i of exp(dt_{t+1} A + ... + dt_end A) dt_t x_t (outer) B_t

Letters as in `ssmzoo.ops.ssd`; s sequences.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmzoo.ops.checks import expect


def expect_cu_seqlens(cu_seqlens: Tensor, device: torch.device) -> None:
    """Check cumulative lengths by what is known without reading them: (s+1) integers on `device`."""
    expect("cu_seqlens", cu_seqlens, ("s+1",), {})
    if cu_seqlens.is_floating_point() or cu_seqlens.is_complex() or cu_seqlens.dtype == torch.bool:
        raise ValueError(f"cu_seqlens has dtype {cu_seqlens.dtype}, expected an integer dtype such as int32")
    if not len(cu_seqlens):
        raise ValueError("cu_seqlens is empty, expected the starts of the sequences and the end of the last one")
    if cu_seqlens.device != device:
        raise ValueError(f"cu_seqlens is on {cu_seqlens.device}, expected {device}")


def varlen_states(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, cu_seqlens: Tensor, initial_states: Tensor | None
) -> Tensor:
    """x (1 l h p), dt (1 l h) after bias, softplus and limits, A (h), B (1 l g n), cu_seqlens (s+1), initial_states
    (1 h p n) of the first sequence -> (s h p n) in dt's dtype. Raises ValueError for lengths that do not fit."""
    ends = cu_seqlens.tolist()
    lengths = [end - start for start, end in zip(ends, ends[1:])]
    if ends[0] != 0 or ends[-1] > x.shape[1] or min(lengths, default=0) < 0:
        raise ValueError(f"cu_seqlens is {ends}, expected numbers from 0 to at most {x.shape[1]}, never falling")
    dt, used = dt[0], ends[-1]
    log_decay = dt * A.to(dt.dtype)  # (l h)
    u = x[0].to(dt.dtype) * dt[..., None]  # (l h p)
    B = B[0].to(dt.dtype).repeat_interleave(x.shape[2] // B.shape[2], dim=1)  # (l h n)
    first = None if initial_states is None else initial_states[0].to(dt.dtype)
    states = []
    for u_i, a_i, B_i in zip(*(t[:used].split(lengths) for t in (u, log_decay, B)), strict=True):
        to_end = F.pad(a_i.flip(0).cumsum(0).flip(0)[1:], (0, 0, 0, min(1, len(a_i)))).exp()  # (l_i h)
        state = torch.einsum("lhp,lhn->hpn", u_i * to_end[..., None], B_i)
        if first is not None:
            state, first = state + first * a_i.sum(0).exp()[:, None, None], None
        states.append(state)
    return torch.stack(states) if states else u.new_zeros(0, *u.shape[1:], B.shape[-1])
