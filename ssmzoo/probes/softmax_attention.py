"""What a tap brings back of softmax attention, beside the scans of scan.py.

b batch, h heads of p channels, l queries, s keys.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ssmzoo.probes.scan import chosen, step_numbers, whole


@dataclass
class Attention:
    """One call of softmax attention: y = softmax(scale q k^T + bias) v, where the mask lets a query see a key.

    q (b h l p), k and v (b h s p): one key and value head per query head | y (b h l p)
    mask       boolean (True: seen) or added to the logits, broadcast over (b h l s); None | causal: only the past
    channels   (h) numbers of the kept heads among `total` | length: number of queries
    positions  (p) the queries kept, None: all; q and y are cut to them
    """

    name: str
    index: int
    q: Tensor
    k: Tensor
    v: Tensor
    y: Tensor
    mask: Tensor | None
    causal: bool
    scale: float
    channels: Tensor
    total: int
    length: int
    positions: Tensor | None = None
    directions: int = 1
    extra: int = 0
    unit = "head"

    @property
    def batch(self) -> int:
        return len(self.q)

    def weights(self, rows: Iterable[int] | None = None) -> Tensor:
        """(b h l s), or (b h rows s) of some of the kept queries: what is read from every key."""
        at = list(range(self.q.shape[2])) if rows is None else [r % self.q.shape[2] for r in rows]
        logits = (self.q[:, :, at] * self.scale) @ self.k.mT
        position = torch.as_tensor(at, device=logits.device)
        position = position if self.positions is None else self.positions[position]
        if self.mask is not None:
            mask = self.mask.expand(*self.mask.shape[:-2], self.length, -1)[..., position, :]
            logits = logits.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else logits + mask
        if self.causal:
            keys = torch.arange(logits.shape[-1], device=logits.device)
            logits = logits.masked_fill(keys > position[:, None], float("-inf"))
        return logits.softmax(-1)

    def at_positions(self, positions: list[int]) -> Attention:
        """The same with the queries `positions` alone."""
        at = step_numbers(self, positions, self.q.device)
        return replace(self, q=self.q[:, :, at], y=self.y[:, :, at], positions=at)

    def whole(self, what: str) -> None:
        whole(self, what)

    def take(self, heads: Iterable[int]) -> Attention:
        """The same attention with fewer heads, given by their index in `channels`."""
        at = chosen(self, heads, self.q.device)
        mask = self.mask
        mask = mask[:, at] if mask is not None and mask.ndim == 4 and mask.shape[1] > 1 else mask
        q, k, v, y = (t[:, at] for t in (self.q, self.k, self.v, self.y))
        return replace(self, q=q, k=k, v=v, y=y, mask=mask, channels=self.channels[at.to(self.channels.device)])
