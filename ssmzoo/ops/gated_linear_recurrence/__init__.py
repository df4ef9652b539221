"""The elementwise recurrence of gated linear RNNs (Gated SSM, Hawk): every channel is a state of its own.

    h_t = a_t h_{t-1} + x_t          with reverse:  h_t = a_t h_{t+1} + x_t

The gradient of x is the same recurrence in the other direction, that of a the gradient of x times h_{t-1}.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssmzoo.ops.checks import compute_dtype, expect_floats
from ssmzoo.ops.dispatch import op
from ssmzoo.ops.library import Differentiable


def check_gated_linear_recurrence(a) -> None:
    expect_floats(a, {}, a="bln", x="bln", initial_state="bn")


@op(check=check_gated_linear_recurrence)
def gated_linear_recurrence(
    a: Tensor, x: Tensor, *, initial_state: Tensor | None = None, reverse: bool = False
) -> Tensor:
    """Run h_t = a_t h_{t-1} + x_t along the second axis, channel by channel.

    a              (b l n)  decay of the state before step t, usually in [0, 1]; 0 begins a new sequence at t
    x              (b l n)  input
    initial_state  (b n)    h before the first step (after the last one with reverse), zero by default
    reverse        from the last step to the first: h_t = a_t h_{t+1} + x_t
    returns        (b l n)  every h_t, in fp32 (fp64 if an input is)

    Raises ValueError when shapes, dtypes or devices disagree, naming the argument.
    Sources: RG-LRU of Griffin (De et al. 2024, arXiv 2402.19427, section 2.4), Birdie (arXiv 2411.01030, section 3.1).
    """
    dtype = compute_dtype(a, x, initial_state)
    a, x = a.to(dtype), x.to(dtype)
    h = x.new_zeros(x.shape[0], x.shape[2]) if initial_state is None else initial_state.to(dtype)
    steps = []
    for t in range(x.shape[1] - 1, -1, -1) if reverse else range(x.shape[1]):
        h = a[:, t] * h + x[:, t]
        steps.append(h)
    return torch.stack(steps[::-1] if reverse else steps, dim=1) if steps else x


def composed(a) -> Tensor:
    """The recurrence of torch's functions in about log2(l) steps, each joining two neighbouring stretches of time.

    Stretches of 1, 2, 4, ... steps that end at t are (product of decays, state from zero); a stretch and the one before
    it make one of twice the length. Nothing is divided, so that decays of 0 are as good as any.
    """
    dtype = compute_dtype(a.a, a.x, a.initial_state)
    decay, h = a.a.to(dtype), a.x.to(dtype)
    if a.reverse:
        decay, h = decay.flip(1), h.flip(1)
    step, length = 1, h.shape[1]
    if length == 1 or a.initial_state is not None and length:
        before = torch.zeros_like(h[:, 0]) if a.initial_state is None else a.initial_state.to(dtype)
        h = torch.cat([h[:, :1] + decay[:, :1] * before[:, None], h[:, 1:]], dim=1)
    while step < length:
        h = torch.cat([h[:, :step], h[:, step:] + decay[:, step:] * h[:, :-step]], dim=1)
        if 2 * step < length:
            decay = torch.cat([decay[:, :step], decay[:, step:] * decay[:, :-step]], dim=1)
        step *= 2
    return h.flip(1) if a.reverse else h


RECURRENCE = Differentiable(
    "gated_linear_recurrence",
    gated_linear_recurrence.Arguments,
    ("h",),
    saved="h",
    like=lambda a: (a.x.new_empty(a.x.shape),),
    twice=composed,
)
