"""Mamba-3's scan: Mamba-2's state-space duality with a rule of integration that weighs both ends of a step.

    S_t = exp(a_t) (S_{t-1} + beta_t sum_r x_{t-1,r} k_{t-1,r}^T) + gamma_t sum_r x_{t,r} k_{t,r}^T
    y_{t,r} = S_t q_{t,r} + D x_{t,r}            x_{t,r} = mimo_r v_t; every rank writes and reads the same state

Term by term, x_s k_s^T enters at s with gamma_s and at s+1 with beta_{s+1}, both decayed alike from s on: so the scan
is Mamba-2's with the weight w_s = gamma_s + beta_{s+1}, except that y_s itself must not see the second part yet.

Letters: b batch, l length, h heads, p width of a head, n state size, r ranks (1 without mimo).
Source: arXiv 2603.15569; state-spaces/mamba modules/mamba3.py (Apache-2.0).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssmzoo.ops.checks import compute_dtype, expect_floats, expect_seq_idx, resets
from ssmzoo.ops.dispatch import op


def check_trapezoidal_scan(given) -> None:
    sizes = expect_floats(
        given,
        {} if given.mimo is not None else {"r": 1},
        v="blhp",
        k="blrhn",
        q="blrhn",
        a="blh",
        gamma="blh",
        beta="blh",
        D="h",
        mimo="hrp",
        initial_state="bhpn",
    )
    expect_seq_idx(given.seq_idx, given.v.device, sizes)
    if given.chunk_size < 1:
        raise ValueError(f"chunk_size = {given.chunk_size}, expected a positive number of tokens")


def rank_inputs(v: Tensor, mimo: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x (b l r h p): every rank's share of v (b l h p)."""
    x = v.to(dtype).unsqueeze(2)
    return x if mimo is None else x * mimo.to(dtype).transpose(0, 1)


@op(check=check_trapezoidal_scan)
def trapezoidal_scan(
    v: Tensor,
    k: Tensor,
    q: Tensor,
    a: Tensor,
    gamma: Tensor,
    beta: Tensor,
    D: Tensor,
    mimo: Tensor | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """The recurrence above.

    v            (b l h p) values
    k, q         (b l r h n) keys and queries, rotated
    a            (b l h) logarithm of the decay, at most 0 for a stable scan
    gamma, beta  (b l h) weight of a token in its own step, and of the token before (without the step's decay)
    D            (h) skip | mimo (h r p) weights of the ranks' inputs, None for r = 1
    initial_state  (b h p n) with the first step's share of the token before it in it already (beta_0 is not used)
    seq_idx      (b l) integers; where they change, a new sequence starts from zeros
    chunk_size   tokens per chunk; changes the speed, not the result
    returns      y (b l r h p) and the last state (b h p n), in fp32 (float64 if an input is)

    Raises ValueError naming the argument, its shape and the one expected.
    """
    dtype = compute_dtype(v, k, q, a)
    x, k, q = rank_inputs(v, mimo, dtype), k.to(dtype), q.to(dtype)
    b, l, r, h, n = k.shape
    S = x.new_zeros(b, h, x.shape[-1], n) if initial_state is None else initial_state.to(dtype)
    reset = None if seq_idx is None else resets(seq_idx)
    ys = []
    for t in range(l):
        if t:
            S = S + beta[:, t, :, None, None] * torch.einsum("brhp,brhn->bhpn", x[:, t - 1], k[:, t - 1])
        if reset is not None:
            S = torch.where(reset[:, t].view(b, 1, 1, 1), 0.0, S)
        S = a[:, t].exp()[..., None, None] * S
        S = S + gamma[:, t, :, None, None] * torch.einsum("brhp,brhn->bhpn", x[:, t], k[:, t])
        ys.append(torch.einsum("bhpn,brhn->brhp", S, q[:, t]) + x[:, t] * D.to(dtype)[:, None])
    return (torch.stack(ys, dim=1) if ys else x.expand(b, 0, r, h, x.shape[-1])), S
