"""Which token stands where: the steps between the order of a model's tokens and the order in which a scan reads them.

    permute_tokens      y_i = x_{order[i]}, or back again
    bidirectional_scan  the sequence forwards and, beside it, backwards (Vim)
    prepend_mean        the mean of all tokens as one more in front (Adventurer)
    mix_tokens          y_i = sum_j weights[i, j] x_j: a permutation made soft (SoftSort)

Maps are laid out by `cross_scan`. All of them are plain indexing; as operators they can be observed, so that whoever
looks at a scan knows the token of every step.

Letters: b batch, l tokens, d width, e channels, m mixtures.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssmzoo.ops.checks import expect, expect_floats
from ssmzoo.ops.dispatch import op


def check_permute_tokens(a) -> None:
    sizes: dict[str, int] = {}
    expect("x", a.x, ("b", "l", "d"), sizes)
    expect("order", a.order, ("l",) if a.order.ndim == 1 else ("b", "l"), sizes)
    if a.order.dtype not in (torch.int64, torch.int32) or a.order.device != a.x.device:
        raise ValueError(f"order is {a.order.dtype} on {a.order.device}, expected int64 or int32 on {a.x.device}")


def check_bidirectional_scan(a) -> None:
    expect("x", a.x, ("b", "e", "l"), {})


def check_prepend_mean(a) -> None:
    expect_floats(a, {}, x="bld")


def check_mix_tokens(a) -> None:
    expect_floats(a, {}, x="bel", weights="bml")


@op(check=check_permute_tokens)
def permute_tokens(x: Tensor, order: Tensor, inverse: bool = False) -> Tensor:
    """Bring tokens into an order, or back out of it.

    x        (b l d)
    order    (l) or (b l) integers, a permutation of the tokens (not checked)
    inverse  undo it: token i of the result is the one that stands at i in `order`
    returns  (b l d): x[:, order]
    """
    order = order.expand(x.shape[0], -1).long()  # len() of a traced tensor is a plain number
    order = order.argsort(-1) if inverse else order
    return x.gather(1, order[..., None].expand_as(x))


@op(check=check_bidirectional_scan)
def bidirectional_scan(x: Tensor) -> Tensor:
    """x (b e l) -> (b 2 e l): the sequence as it is, and reversed."""
    steps = torch.arange(x.shape[-1], device=x.device)
    return x[..., torch.stack([steps, steps.flip(0)])].movedim(-2, 1)


@op(check=check_prepend_mean)
def prepend_mean(x: Tensor) -> Tensor:
    """x (b l d) -> (b l+1 d): the mean over the tokens, then the tokens."""
    return torch.cat([x.sum(1, keepdim=True) / x.shape[1], x], dim=1)


@op(check=check_mix_tokens)
def mix_tokens(x: Tensor, weights: Tensor) -> Tensor:
    """x (b e l), weights (b m l) -> (b e m): token i is the sum of weights[:, i, j] x[:, :, j] over j."""
    return (x[:, :, None] * weights[:, None]).sum(-1)
