"""On which token of its model every step of a scan falls, put together from the operators that lay tokens out.

An operator seen in a module's forward says how the tokens stand there from now on, for the scans of that module and of
those that it calls; the permutations of callers and callee are composed.

b batch, l steps, k directions side by side, e channels of one direction.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ssmzoo.probes.modules import Call


@dataclass
class TokenOrder:
    """tokens (k l) or (b k l): the token of every step | extra: the last so many tokens are none of the model's, means
    over all of them | batch, channels: of the sequences that were laid out; None where one direction goes everywhere"""

    tokens: Tensor
    extra: int = 0
    batch: int | None = None
    channels: int | None = None

    @property
    def directions(self) -> int:
        return self.tokens.shape[-2]

    @property
    def steps(self) -> int:
        return self.tokens.shape[-1]

    def for_scan(self, b: int, e: int, l: int) -> TokenOrder | None:
        """The order as a scan of (b e l) sees it, its directions among the channels, or as rows of the batch (then
        the tokens are (b 1 l)); None where it is not this scan's."""
        k = self.directions
        if self.steps != l or (self.tokens.ndim == 3 and len(self.tokens) != b):
            return None
        if k == 1 or (b == self.batch and e == k * self.channels):
            return self
        if b == k * self.batch and e == self.channels:
            return TokenOrder(self.tokens[:, None].repeat(self.batch, 1, 1), self.extra)
        return None

    def within(self, outer: TokenOrder) -> TokenOrder:
        """This order of tokens that stood in the order `outer` (one direction) before."""
        more = torch.arange(self.extra, device=self.tokens.device) + outer.steps
        before = torch.cat([outer.tokens, more.expand(*outer.tokens.shape[:-1], -1)], dim=-1)
        if before.ndim == 2:
            tokens = before[0][self.tokens]
        else:
            inner = self.tokens if self.tokens.ndim == 3 else self.tokens.expand(len(before), -1, -1)
            tokens = before.expand(-1, inner.shape[1], -1).gather(2, inner)
        return TokenOrder(tokens, self.extra + outer.extra, self.batch, self.channels)


def permuted(before: TokenOrder | None, order: Tensor) -> TokenOrder:
    """Tokens brought into `order` (l) or (b l)."""
    after = TokenOrder(order[..., None, :])
    return after.within(before) if before is not None and before.directions == 1 else after


def with_mean(before: TokenOrder | None, l: int, device: torch.device) -> TokenOrder:
    """The mean of l tokens in front of them: a token more, numbered behind the model's."""
    after = TokenOrder(torch.cat([torch.tensor([l]), torch.arange(l)]).to(device)[None], extra=1)
    return after.within(before) if before is not None and before.directions == 1 and before.steps == l else after


def order_of_scan(calls: list[Call], b: int, e: int, l: int) -> tuple[TokenOrder | None, TokenOrder | None]:
    """The order of a scan of (b e l) in the innermost of `calls`, by the model's tokens and by those that came to that
    call; None: as they came."""
    local = calls[-1].notes.get("order")
    local = whole = None if local is None else local.for_scan(b, e, l)
    for call in reversed(calls[:-1]):
        outer = call.notes.get("order")
        outer = None if outer is None else outer.for_scan(b, e, l - (0 if whole is None else whole.extra))
        if outer is not None and whole is None:
            whole = outer
        elif outer is not None and outer.directions == 1:
            whole = whole.within(outer)
    return whole, local
