"""trapezoidal_scan by Mamba-2's scan: the ranks of a token are so many tokens, minus what a token must not see."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmzoo.ops.checks import compute_dtype
from ssmzoo.ops.ssd import ssd_scan
from ssmzoo.ops.trapezoidal_scan import rank_inputs, rotary_trapezoidal_scan, trapezoidal_scan, turned_heads


@trapezoidal_scan.register("torch")
def trapezoidal_scan_torch(given) -> tuple[Tensor, Tensor]:
    v, k, q, a, gamma, beta, D, mimo, initial_state, seq_idx, chunk_size = given
    dtype = compute_dtype(v, k, q, a)
    x, k, q, r = rank_inputs(v, mimo, dtype), k.to(dtype), q.to(dtype), k.shape[2]
    w = gamma + F.pad(beta[:, 1:], (0, 0, 0, 1))
    decay = F.pad(a[:, :, None], (0, 0, 0, r - 1))  # (b l r h): a token decays once, before its first rank
    documents = None if seq_idx is None else seq_idx.repeat_interleave(r, dim=1)
    X = (x * w[:, :, None, :, None]).flatten(1, 2)
    decay, keys, queries = (t.flatten(1, 2) for t in (decay, k, q))
    y, S = ssd_scan(X, decay, keys, queries, initial_state, documents, chunk_size)
    # inside a token, rank i has seen ranks j <= i with weight w; all ranks should count, with weight gamma
    seen = torch.ones(r, r, device=v.device, dtype=dtype).tril()
    own = torch.einsum("blihn,bljhn->blhij", q, k) * (gamma[..., None, None] - w[..., None, None] * seen)
    y = y.unflatten(1, (-1, r)) + torch.einsum("blhij,bljhp->blihp", own, x)
    return y + x * D.to(dtype)[:, None], S


@rotary_trapezoidal_scan.register("torch")
def rotary_trapezoidal_scan_torch(given) -> tuple[Tensor, Tensor]:
    v, k, q, phase, k_bias, q_bias, a, *rest = given
    dtype, interleaved = compute_dtype(v, k, q, a, phase), given.mimo is None
    phase = phase.to(dtype)
    k = turned_heads(k.to(dtype), k_bias.to(dtype), phase, interleaved)
    q = turned_heads(q.to(dtype), q_bias.to(dtype), phase, interleaved)
    return trapezoidal_scan(v, k, q, a, *rest)
