"""gated_delta_rule in PyTorch, any device: the WY form, matrix products over chunks, autograd's gradients.

In a chunk, with D_ij = exp(g_{j+1} + ... + g_i) for j <= i (per head, or per channel c of the key):

    A_ij = beta_i sum_c k_ic k_jc D_ijc  (j < i)      T = (I + A)^-1 diag(beta)
    U = T v - T (k o start) S                         Y = (q o start) S + tril(sum_c q_ic k_jc D_ijc) U
    S <- whole o S + (k o end)^T U
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmzoo.ops.checks import compute_dtype, resets
from ssmzoo.ops.gated_delta_rule import gated_delta_rule

CHANNEL_CHUNK = 16  # with a decay per channel there is a tensor (q, q, n) for every chunk of q


def chunked(a) -> tuple[Tensor, Tensor]:
    """Extra memory O(b l h (q + n + p)), times q for a decay per channel; states only at chunk boundaries."""
    (b, l, h, n), p, per_channel = a.q.shape, a.v.shape[3], a.g.ndim == 4
    dtype = compute_dtype(a.q, a.k, a.v, a.g, a.beta)
    state = a.q.new_zeros(b, h, n, p, dtype=dtype) if a.initial_state is None else a.initial_state.to(dtype)
    if l == 0 or b == 0:
        return a.v * 0, state
    size = max(1, min(a.chunk_size, CHANNEL_CHUNK if per_channel else a.chunk_size, l))
    pad, c = -l % size, -(-l // size)

    def chunks(t: Tensor) -> Tensor:  # (b l h ...) -> (b c h q ...), padded with positions that change nothing
        t = F.pad(t.to(dtype), (0, 0) * (t.ndim - 2) + (0, pad))
        return t.unflatten(1, (c, size)).transpose(2, 3)

    q, k, v, g, beta = (chunks(t) for t in (a.q, a.k, a.v, a.g, a.beta.unsqueeze(-1)))
    g = g if per_channel else g.unsqueeze(-1)  # (b c h q n|1)
    with torch.autocast(a.q.device.type, enabled=False):
        between, start, end, whole = decays(g, documents(a.seq_idx, pad, c, size))
        if per_channel:
            kd = k.unsqueeze(-3) * between  # (b c h i j n): keys j as they are seen from i
            kk, qk = ((kd @ t.unsqueeze(-1)).squeeze(-1) for t in (k, q))  # (b c h i j)
        else:
            kk, qk = (t @ k.mT * between.squeeze(-1) for t in (k, q))
        system = torch.eye(size, dtype=dtype, device=k.device) + (beta * kk).tril(-1)
        both = torch.linalg.solve_triangular(system, beta * torch.cat([v, k * start], -1), upper=False)
        values, weights = both.split([p, n], dim=-1)
        q_start, k_end, ys = q * start, (k * end).mT, []
        for i in range(c):
            u = values[:, i] - weights[:, i] @ state  # (b h q p)
            ys.append(q_start[:, i] @ state + qk[:, i] @ u)
            state = whole[:, i].unsqueeze(-1) * state + k_end[:, i] @ u
        y = torch.stack(ys, dim=1)
    return y.transpose(2, 3).flatten(1, 2)[:, :l].to(a.v.dtype), state


def documents(seq_idx: Tensor | None, pad: int, c: int, size: int) -> tuple[Tensor, Tensor] | None:
    """Number of resets up to each position, (b c 1 q 1), and at the last position before each chunk, (b c 1 1 1)."""
    if seq_idx is None:
        return None
    count = resets(seq_idx).long().cumsum(1)
    count = torch.cat([count, count[:, -1:].expand(-1, pad)], dim=1).unflatten(1, (c, size))
    previous = F.pad(count[:, :-1, -1], (1, 0))
    return count[:, :, None, :, None], previous[:, :, None, None, None]


def decays(g: Tensor, where: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """exp of sums of g (... q n) inside a chunk: between two positions (... i j n), zero for j > i; from the start up
    to and including each position, from after each position to the end (... q n); over the whole chunk (... n). Sums
    are formed for each pair, so that no large sums are subtracted; what crosses a document boundary is exactly 0."""
    size = g.shape[-2]
    lower = torch.ones(size, size, dtype=torch.bool, device=g.device).tril()
    pairs = g.unsqueeze(-2).expand(*g.shape[:-1], size, g.shape[-1])  # (... i j n), the same for every j
    pairs = pairs.masked_fill(~lower.tril(-1).unsqueeze(-1), 0).cumsum(-3)
    start = g.cumsum(-2)
    end, whole, keep = pairs[..., -1, :, :], start[..., -1, :], lower.unsqueeze(-1)
    if where is not None:
        here, before = where
        keep = keep & (here.unsqueeze(-2) == here.unsqueeze(-3))
        start = start.masked_fill(here != before, -torch.inf)
        end = end.masked_fill(here != here[..., -1:, :], -torch.inf)
        whole = whole.masked_fill(here[..., -1, :] != before[..., 0, :], -torch.inf)
    return pairs.masked_fill(~keep, -torch.inf).exp(), start.exp(), end.exp(), whole.exp()


gated_delta_rule.register("torch")(chunked)
