"""A linear recurrence with complex diagonal transitions.

    h_t = a_t h_{t-1} + b_t

Letters: b batch, l length, n state size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssmzoo.ops.checks import expect
from ssmzoo.ops.dispatch import op


def check_complex_scan(given) -> None:
    sizes: dict[str, int] = {}
    expect("a", given.a, ("b", "l", "n"), sizes)
    expect("b", given.b, ("b", "l", "n"), sizes)
    expect("initial_state", given.initial_state, ("b", "n"), sizes)
    for name, value in given._asdict().items():
        if value is None:
            continue
        if value.device != given.a.device:
            raise ValueError(f"{name} is on {value.device}, expected {given.a.device}, where the first argument lies")
        if not value.is_complex():
            raise ValueError(f"{name} has dtype {value.dtype}, expected complex64 or complex128")


@op(check=check_complex_scan)
def complex_scan(a: Tensor, b: Tensor, initial_state: Tensor | None = None) -> Tensor:
    """States of the recurrence.

    a, b           (b l n) complex: transitions, usually with |a| <= 1, and inputs
    initial_state  (b n) complex, zeros by default
    returns        (b l n) complex: h_1 ... h_l

    Raises ValueError naming the argument, its shape or dtype and the one expected.
    """
    h = b.new_zeros(b.shape[0], b.shape[2]) if initial_state is None else initial_state
    states = []
    for t in range(a.shape[1]):
        h = a[:, t] * h + b[:, t]
        states.append(h)
    return torch.stack(states, dim=1) if states else b
