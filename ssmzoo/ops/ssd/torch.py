"""ssd_scan and mamba_chunk_scan_combined in PyTorch, any device: matrix products over chunks, autograd's gradients."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F

from ssmzoo.ops.checks import compute_dtype, resets
from ssmzoo.ops.ssd import TORCH_CHUNK, Recurrence, around_scan, mamba_chunk_scan_combined, ssd_scan


def chunked_scan(X, a, B, C, initial_states, seq_idx, chunk_size):
    """Chunks of q positions as matrix products; extra memory O(b l h (q + p)), states only at chunk boundaries."""
    b, l, h, p = X.shape
    g, n = B.shape[2:]
    q = max(1, min(chunk_size, TORCH_CHUNK, l))
    dtype = compute_dtype(X, a, B, C)
    state = X.new_zeros(b, h, p, n, dtype=dtype) if initial_states is None else initial_states.to(dtype)
    if l == 0 or b == 0:
        return X * 0, state
    pad, c, out_dtype = -l % q, -(-l // q), X.dtype

    def chunks(v, heads):  # (b l ... ) -> (b c g r q ...)
        v = F.pad(v.to(dtype), (0, 0) * (v.ndim - 2) + (0, pad))
        v = v.unflatten(1, (c, q)).unflatten(3, (g, heads))
        return v.movedim(2, 4)

    X, a = chunks(X, h // g), chunks(a, h // g)  # (b c g r q p), (b c g r q)
    B, C = chunks(B, 1), chunks(C, 1)  # (b c g 1 q n)
    with torch.autocast(X.device.type, enabled=False):
        inside, from_start, to_end, whole = _decays(a, _documents(seq_idx, pad, c, q))
        Y = (inside * (C @ B.mT)) @ X  # (b c g r q p)
        update = (X * to_end.unsqueeze(-1)).mT @ B  # (b c g r p n)
        state, before = state.unflatten(1, (g, h // g)), []
        for i in range(c):
            before.append(state)
            state = whole[:, i, ..., None, None] * state + update[:, i]
        Y = Y + from_start.unsqueeze(-1) * (C @ torch.stack(before, dim=1).mT)
    Y = Y.movedim(4, 2).reshape(b, c * q, h, p)[:, :l]
    return Y.to(out_dtype), state.flatten(1, 2)


def _documents(seq_idx, pad, c, q):
    """Number of resets up to each position, (b c 1 1 q), and at the last position before each chunk, (b c 1 1)."""
    if seq_idx is None:
        return None
    count = resets(seq_idx).long().cumsum(1)
    count = torch.cat([count, count[:, -1:].expand(-1, pad)], dim=1).unflatten(1, (c, q))
    previous = F.pad(count[:, :-1, -1], (1, 0))
    return count[:, :, None, None], previous[:, :, None, None]


def _decays(a, documents):
    """exp of sums of a (... q) inside a chunk: between two positions (... q q), from the start up to and including each
    position, from after each position to the end, and over the whole chunk. Sums are accumulated for each pair, so
    that no large sums are subtracted; what crosses a document boundary is exactly 0, with gradient 0."""
    q = a.shape[-1]
    lower = torch.ones(q, q, dtype=torch.bool, device=a.device).tril()
    pairs = a.unsqueeze(-1).expand(*a.shape, q).masked_fill(~lower.tril(-1), 0).cumsum(-2)
    start = a.cumsum(-1)
    end = pairs[..., -1, :]
    whole = start[..., -1]
    keep = lower
    if documents is not None:
        here, previous = documents
        keep = lower & (here.unsqueeze(-1) == here.unsqueeze(-2))
        start = start.masked_fill(here != previous.unsqueeze(-1), -math.inf)
        end = end.masked_fill(here != here[..., -1:], -math.inf)
        whole = whole.masked_fill(here[..., -1] != previous, -math.inf)
    return pairs.masked_fill(~keep, -math.inf).exp(), start.exp(), end.exp(), whole.exp()


def scan_with_skip(r: Recurrence, chunk_size: int):
    """A bare scan of dt x, plus D x."""
    dtype = compute_dtype(r.x, r.log_decay, r.B, r.C)
    x = r.x.to(dtype)
    y, state = chunked_scan(x * r.dt.unsqueeze(-1), r.log_decay, r.B, r.C, r.initial_states, r.seq_idx, chunk_size)
    return (y if r.D is None else y + x * r.D.to(dtype)).to(r.x.dtype), state


ssd_scan.register("torch")(lambda a: chunked_scan(*a))
mamba_chunk_scan_combined.register("torch")(functools.partial(around_scan, scan_with_skip))
