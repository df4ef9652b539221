"""taylor_attention in PyTorch, any device: matrix products over chunks, autograd's gradients."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmzoo.ops.checks import compute_dtype, resets
from ssmzoo.ops.taylor_attention import features, n_features, taylor_attention, with_ones

CHUNK = 64  # positions


@taylor_attention.register("torch")
def chunked(a) -> tuple[Tensor, Tensor]:
    """Memory O(l (n + chunk)) per head, one state per chunk."""
    dtype = compute_dtype(a.q, a.k, a.v, a.state)
    (b, l, h, p), f = a.v.shape, a.q.shape[-1]
    S = a.v.new_zeros(b, h, n_features(f), p + 1, dtype=dtype) if a.state is None else a.state.to(dtype)
    if l == 0 or b == 0:
        return a.v * 0, S
    m = min(CHUNK, l)
    pad, c = -l % m, -(-l // m)

    def chunks(t: Tensor) -> Tensor:  # (b l h x) -> (b c h m x)
        return F.pad(t.to(dtype), (0, 0, 0, 0, 0, pad)).unflatten(1, (c, m)).transpose(2, 3)

    q, k, v = chunks(a.q), chunks(a.k), chunks(with_ones(a.v, a.mask, dtype))  # padding is no key: its 1 is 0
    keep, start, end, whole = _documents(a.seq_idx, pad, c, m, a.q.device)
    with torch.autocast(a.q.device.type, enabled=False):
        s = q @ k.mT * f**-0.5  # (b c h m m)
        y = ((1 + s + s.square() / 2) * keep) @ v
        update = features(k).mT @ (v if end is None else v * end)  # (b c h n p+1)
        before = []
        for i in range(c):
            before.append(S)
            S = (S if whole is None else S * whole[:, i]) + update[:, i]
        past = features(q) @ torch.stack(before, dim=1)
        y = y + (past if start is None else past * start)
    y = y.transpose(2, 3).reshape(b, c * m, h, p + 1)[:, :l]
    return (y[..., :p] / (y[..., p:] + a.eps)).to(a.v.dtype), S


def _documents(seq_idx: Tensor | None, pad: int, c: int, m: int, device):
    """Who sees whom in a chunk (b c 1 m m), who sees the state before it (b c 1 m 1), who is in the document that it
    ends with (b c 1 m 1), and whether that document began before it (b c 1 1 1); bool, None for all."""
    lower = torch.ones(m, m, dtype=torch.bool, device=device).tril()
    if seq_idx is None:
        return lower, None, None, None
    count = resets(seq_idx).long().cumsum(1)
    count = torch.cat([count, count[:, -1:].expand(-1, pad)], dim=1).unflatten(1, (c, m))
    previous = F.pad(count[:, :-1, -1], (1, 0))[..., None]  # (b c 1)
    last = count[..., -1:]
    keep = lower & (count[..., None] == count[..., None, :])
    start, end, whole = count == previous, count == last, last == previous
    return keep[:, :, None], start[:, :, None, :, None], end[:, :, None, :, None], whole[..., None, None]
