"""One gated recurrence whose channels run half forwards and half backwards, the latter over the prefix only (Birdie).

    forward half    h_t = a_t h_{t-1} + x_t      over the whole sequence
    reverse half    h_t = a_t h_{t+1} + x_t      within the prefix; behind it h_t = x_t

Both halves have the decays and inputs that the causal layer has, so that parameters and cost are the same. Only the
decay ends at the last position of the prefix; the input term stays. What follows carries the forward half alone.

b batch, l length, n channels, m of which run forwards.
Source: Blouir et al. 2024 (arXiv 2411.01030), section 3.4 and appendix A.4.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ssmzoo.layers.state import Padding, inside_prefix
from ssmzoo.ops import gated_linear_recurrence


def forward_channels(n: int, bidirectional: bool) -> int:
    """m: how many of n channels run forwards. Raises ValueError when there are not two to share out."""
    if bidirectional and n < 2:
        raise ValueError(f"a bidirectional layer shares its channels out to two directions; d_state is {n}, give 2")
    return n - n // 2 if bidirectional else n


def document_starts(state_given: bool, seq_idx: Tensor | None, like: Tensor) -> Tensor:
    """(b l) bool: True at the first token of every document of x (b l ...), which continues one if a state is given."""
    b, l = like.shape[:2]
    first = torch.zeros(b, l, dtype=torch.bool, device=like.device)
    if not state_given:
        first = F.pad(first[:, 1:], (1, 0), value=True)
    if seq_idx is not None:
        first = first | F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))
    return first


def two_way(
    a: Tensor,
    x: Tensor,
    h: Tensor | None,
    m: int,
    *,
    padding: Padding | None = None,
    seq_idx: Tensor | None = None,
    prefix: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Decays a, inputs x (b l n) and the state h (b m) before them -> all states (b l n), the last of the first m."""
    n = x.shape[-1]
    if h is not None and x.shape[1] == 1 and padding is None and seq_idx is None and prefix is None:
        last = torch.addcmul(x[:, 0, :m], a[:, 0, :m], h)
        return (last if m == n else torch.cat([last, x[:, 0, m:]], dim=-1))[:, None], last
    ahead, fed = a[..., :m], x[..., :m]
    if seq_idx is not None:
        ahead = ahead.masked_fill(document_starts(True, seq_idx, x)[..., None], 0)
    if padding is not None:
        ahead = ahead.masked_fill(~padding.mask[..., None], 1)
        fed = fed.masked_fill(~padding.mask[..., None], 0)
    forwards = gated_linear_recurrence(ahead, fed, initial_state=h)  # (b l m)
    last = forwards[:, -1].clone()  # a view would keep all of them alive
    if m == n:
        return forwards, last
    backwards = x[..., m:]
    if prefix is not None:
        inside = inside_prefix(prefix, x.shape[1])
        joined = inside[:, :-1] & inside[:, 1:]  # (b l-1): the next position is of the same prefix
        if seq_idx is not None:
            joined = joined & (seq_idx[:, :-1] == seq_idx[:, 1:])
        behind = a[..., m:].masked_fill(~F.pad(joined, (0, 1))[..., None], 0)
        backwards = gated_linear_recurrence(behind, backwards, reverse=True)
    return torch.cat([forwards, backwards], dim=-1), last
