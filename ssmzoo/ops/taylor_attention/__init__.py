"""Linear attention whose kernel is the second-order Taylor series of exp (Based), with its state carried.

    s_tr = q_t . k_r / sqrt(f)      w_tr = 1 + s_tr + s_tr^2 / 2 = phi(q_t) . phi(k_r)
    y_t = sum_{r <= t} w_tr v_r / (sum_{r <= t} w_tr + eps)
    S_t = S_{t-1} + phi(k_t) (outer) [v_t, 1]      y_t = phi(q_t) S_t, its first p channels over the last

phi(x) = [1, x', x'_i x'_j for i < j, x'_i^2 / sqrt(2)] with x' = x / f^(1/4): a product of two channels is kept once,
so that the length is (f+1)(f+2)/2 instead of the 1 + f + f^2 of the published code, with the same inner products.
Inside a chunk the weights w are computed from the scores themselves; one state per chunk carries the rest.

A prefix that every position may see, as in prefix linear attention, is nothing but a state to begin with:
`taylor_state(k, v)`.

Letters: b batch, l length, h heads, f width of queries and keys, p width of values, n = (f+1)(f+2)/2 features.
Source: Arora et al. 2024 (arXiv 2402.18668), section 4; HazyResearch/based based/models/mixers/linear_attention.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ssmzoo.ops.checks import compute_dtype, expect, expect_floats, expect_seq_idx, resets
from ssmzoo.ops.dispatch import op
from ssmzoo.ops.library import Differentiable


def n_features(f: int) -> int:
    """Length of phi for queries and keys of f channels."""
    return (f + 1) * (f + 2) // 2


def features(x: Tensor) -> Tensor:
    """phi of every vector, (... f) -> (... n)"""
    f = x.shape[-1]
    x = x * f**-0.25
    i, j = torch.triu_indices(f, f, device=x.device)
    once = 1 - (1 - 0.5**0.5) * (i == j).to(x.dtype)
    return torch.cat([torch.ones_like(x[..., :1]), x, x[..., i] * x[..., j] * once], dim=-1)


def with_ones(v: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[v, 1] (b l h p+1), zero where mask (b l) is False."""
    v = torch.cat([v.to(dtype), torch.ones_like(v[..., :1], dtype=dtype)], dim=-1)
    return v if mask is None else v * mask[..., None, None]


def check(a) -> None:
    sizes = expect_floats(a, {}, q="blhf", k="blhf", v="blhp")
    if sizes["f"] < 1:
        raise ValueError("q has no channels, expected at least one per head")
    if a.mask is not None:
        expect("mask", a.mask, ("b", "l"), sizes)
        if a.mask.dtype != torch.bool or a.mask.device != a.q.device:
            raise ValueError(f"mask is {a.mask.dtype} on {a.mask.device}, expected torch.bool on {a.q.device}")
    expect_seq_idx(a.seq_idx, a.q.device, sizes)
    sizes |= {"(f+1)(f+2)/2": n_features(sizes["f"]), "p+1": sizes["p"] + 1}
    expect_floats(a, sizes, state=("b", "h", "(f+1)(f+2)/2", "p+1"))
    if a.eps < 0:
        raise ValueError(f"eps = {a.eps}, expected a number that is not negative")


@op(check=check)
def taylor_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    seq_idx: Tensor | None = None,
    eps: float = 1e-12,
) -> tuple[Tensor, Tensor]:
    """y_t = sum_{r <= t} w_tr v_r / (sum_{r <= t} w_tr + eps), w = 1 + s + s^2 / 2 of the scores s = q . k / sqrt(f).

    q, k     (b l h f)
    v        (b l h p)
    state    (b h n p+1)  sums of phi(k) (outer) [v, 1] before the first position, zero when missing
    mask     (b l) bool   False: a key that nobody sees (padding)
    seq_idx  (b l) int    where it changes from t-1 to t, the sums are set to 0 before t
    returns  (b l h p) in v's dtype, and the state after the last position, fp32 (float64 for float64 input)

    Time and memory are linear in l; a call with l = 1 is a decoding step in constant time. The denominator is at least
    half the number of keys. Raises ValueError naming the argument, its shape and the one expected.
    """
    dtype = compute_dtype(q, k, v, state)
    (b, l, h, p), n = v.shape, n_features(q.shape[-1])
    phi_q, phi_k, v1 = features(q.to(dtype)), features(k.to(dtype)), with_ones(v, mask, dtype)
    S = v1.new_zeros(b, h, n, p + 1) if state is None else state.to(dtype)
    reset = None if seq_idx is None else resets(seq_idx)
    sums = []
    for t in range(l):
        if reset is not None:
            S = torch.where(reset[:, t].view(b, 1, 1, 1), 0.0, S)
        S = S + phi_k[:, t].unsqueeze(-1) * v1[:, t].unsqueeze(-2)
        sums.append((phi_q[:, t].unsqueeze(-1) * S).sum(-2))
    y = torch.stack(sums, dim=1) if sums else v1
    return (y[..., :p] / (y[..., p:] + eps)).to(v.dtype), S


def taylor_state(k: Tensor, v: Tensor, state: Tensor | None = None, *, mask: Tensor | None = None) -> Tensor:
    """The sums over keys that all positions will see: sum_r phi(k_r) (outer) [v_r, 1], plus `state`.

    k (b m h f), v (b m h p), mask (b m) bool: False for keys left out -> (b h n p+1), a state for `taylor_attention`
    """
    dtype = compute_dtype(k, v, state)
    with torch.autocast(k.device.type, enabled=False):
        phi, v1 = features(k.to(dtype)).transpose(1, 2), with_ones(v, mask, dtype).transpose(1, 2)
        sums = phi.mT @ v1
    return sums if state is None else sums + state.to(dtype)


class Inputs(NamedTuple):
    """The arguments of `taylor_attention`, as the kernels take them."""

    q: Tensor
    k: Tensor
    v: Tensor
    state: Tensor | None
    mask: Tensor | None
    seq_idx: Tensor | None
    eps: float


def empty_results(a: Inputs) -> tuple[Tensor, Tensor]:
    """Uninitialised y (as v, contiguous) and last state (b h n p+1)."""
    b, _, h, p = a.v.shape
    dtype = compute_dtype(a.q, a.k, a.v, a.state)
    return a.v.new_empty(a.v.shape), a.v.new_empty(b, h, n_features(a.q.shape[-1]), p + 1, dtype=dtype)


TAYLOR = Differentiable("taylor_attention", Inputs, ("y", "last"), saved="saved", like=empty_results, refer="torch")


def quadratic(q: Tensor, k: Tensor, v: Tensor, eps: float = 1e-12) -> Tensor:
    """The same by all pairs of positions, as published for training: O(l^2) time and memory; to compare with."""
    s = torch.einsum("blhf,bmhf->bhlm", q, k) * q.shape[-1] ** -0.5
    w = torch.tril(1 + s + s.square() / 2)
    return torch.einsum("bhlm,bmhp->blhp", w / (w.sum(-1, keepdim=True) + eps), v)


def document_starts(seq_idx: Tensor) -> Tensor:
    """(b l) int32: the index at which each position's document begins; 0 for the one that continues the state."""
    index = torch.arange(seq_idx.shape[1], device=seq_idx.device)
    return torch.where(resets(seq_idx), index, 0).cummax(1).values.to(torch.int32)
