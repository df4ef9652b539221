"""Mamba-3's scan: Mamba-2's state-space duality with a rule of integration that weighs both ends of a step.

    S_t = exp(a_t) (S_{t-1} + beta_t sum_r x_{t-1,r} k_{t-1,r}^T) + gamma_t sum_r x_{t,r} k_{t,r}^T
    y_{t,r} = S_t q_{t,r} + D x_{t,r}            x_{t,r} = mimo_r v_t; every rank writes and reads the same state

Term by term, x_s k_s^T enters at s with gamma_s and at s+1 with beta_{s+1}, both decayed alike from s on: so the scan
is Mamba-2's with the weight w_s = gamma_s + beta_{s+1}, except that y_s itself must not see the second part yet.

`rotary_trapezoidal_scan` makes k and q on the way: those of a group, biased and turned per head.

Letters: b batch, l length, h heads, p width of a head, n state size, r ranks (1 without mimo),
g groups sharing keys and queries, m angles.
Source: arXiv 2603.15569; state-spaces/mamba modules/mamba3.py (Apache-2.0).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmzoo.ops.checks import compute_dtype, expect_floats, expect_seq_idx, resets
from ssmzoo.ops.dispatch import op
from ssmzoo.ops.library import Differentiable
from ssmzoo.ops.rotary import rotate


def check_trapezoidal_scan(given) -> None:
    _check(given, k="blrhn", q="blrhn")


def check_rotary(given) -> None:
    more = {"k": "blrgn", "q": "blrgn", "phase": "blhm", "k_bias": "hrn", "q_bias": "hrn"}
    sizes = _check(given, **more)
    if sizes["g"] == 0 or sizes["h"] % sizes["g"]:
        raise ValueError(f"k has {sizes['g']} groups, which do not divide the {sizes['h']} heads of v")
    if 2 * sizes["m"] > sizes["n"]:
        raise ValueError(
            f"phase has {sizes['m']} angles, expected at most one per two of the {sizes['n']} channels of k"
        )


def _check(given, **axes: str) -> dict[str, int]:
    rest = {"a": "blh", "gamma": "blh", "beta": "blh", "D": "h", "mimo": "hrp", "initial_state": "bhpn"}
    sizes = expect_floats(given, {} if given.mimo is not None else {"r": 1}, v="blhp", **axes, **rest)
    expect_seq_idx(given.seq_idx, given.v.device, sizes)
    if given.chunk_size < 1:
        raise ValueError(f"chunk_size = {given.chunk_size}, expected a positive number of tokens")
    return sizes


def rank_inputs(v: Tensor, mimo: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x (b l r h p): every rank's share of v (b l h p)."""
    x = v.to(dtype).unsqueeze(2)
    return x if mimo is None else x * mimo.to(dtype).transpose(0, 1)


@op(check=check_trapezoidal_scan, parts=("ssd_scan",))
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


def turned_heads(k: Tensor, bias: Tensor, phase: Tensor, interleaved: bool) -> Tensor:
    """Keys or queries of groups (b l r g n) -> of heads, biased and turned by their phases (b l r h n)."""
    h, r, n = bias.shape
    k = k.repeat_interleave(h // k.shape[3], dim=3) + bias.transpose(0, 1)
    phase = phase[:, :, None]
    if not interleaved:
        phase = F.pad(phase, (0, n // 2 - phase.shape[-1]))
    return rotate(k, phase.cos(), phase.sin(), interleaved=interleaved)


@op(check=check_rotary, parts=("trapezoidal_scan", "ssd_scan"))
def rotary_trapezoidal_scan(
    v: Tensor,
    k: Tensor,
    q: Tensor,
    phase: Tensor,
    k_bias: Tensor,
    q_bias: Tensor,
    a: Tensor,
    gamma: Tensor,
    beta: Tensor,
    D: Tensor,
    mimo: Tensor | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """`trapezoidal_scan` of keys and queries that heads share, biased and turned per head: Rot(phase) (k + k_bias).

    k, q           (b l r g n) head i uses group i // (h/g)
    phase          (b l h m) radians; without mimo, angle i turns channels 2i and 2i + 1, with it i and i + n/2
    k_bias, q_bias (h r n)
    and the rest as in `trapezoidal_scan`, whose results these are.

    Raises ValueError naming the argument, its shape and the one expected.
    """
    dtype = compute_dtype(v, k, q, a, phase)
    k, q = (
        turned_heads(t.to(dtype), bias.to(dtype), phase.to(dtype), mimo is None)
        for t, bias in ((k, k_bias), (q, q_bias))
    )
    return trapezoidal_scan.reference(v, k, q, a, gamma, beta, D, mimo, initial_state, seq_idx, chunk_size)


class Inputs(NamedTuple):
    """What the kernels take: one rank; k, q (b l g n); phase (b l h m), k_bias, q_bias (h n), or none of the three."""

    v: Tensor
    k: Tensor
    q: Tensor
    a: Tensor
    gamma: Tensor
    beta: Tensor
    D: Tensor
    phase: Tensor | None = None
    k_bias: Tensor | None = None
    q_bias: Tensor | None = None
    initial_state: Tensor | None = None
    seq_idx: Tensor | None = None


def empty_results(a: Inputs) -> tuple[Tensor, Tensor]:
    """Uninitialised y (b l h p) and last state (b h p n), fp32."""
    b, _, h, p = a.v.shape
    return tuple(a.v.new_empty(shape, dtype=torch.float32) for shape in (a.v.shape, (b, h, p, a.k.shape[3])))


SCAN = Differentiable("trapezoidal_scan", Inputs, ("y", "state"), saved="saved", like=empty_results)
